"""Models in GGUF files equal the checkpoints they were made from."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError, ModelUnreadable
from penstock.kernels import CPUOps, Ops, Quantization, ReferenceOps
from penstock.kernels.native import NATIVE
from penstock.models import read_config, read_sampling_defaults
from penstock.models.decoder import count_parameters, load_model
from penstock.protocol import SamplingDefaults
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate
from tests.engines import build_engine, greedy, run_to_end, tokens_of
from tests.gguf_files import ARCHITECTURES, as_format, random_blocks, write_gguf
from tests.kernels.backends import needs_native
from tests.packing import layout_of
from tests.tiny_models import make_checkpoint, reference_greedy, reference_logits

K = gguf.GGMLQuantizationType
TOKENS = [(11 * i + 5) % 256 for i in range(60)]


class ExactInputs(CPUOps):
    """Leaves activations as they are, whatever codes are made for."""

    def form_of_codes(self, bits: int, group: int | None, *, int8_activations: bool) -> Quantization | None:
        return super().form_of_codes(bits, group, int8_activations=False)


EXACT = ReferenceOps() if NATIVE is None else ExactInputs()


@torch.inference_mode()
def logits(path: Path, *, ops: Ops = EXACT, **options: Any) -> torch.Tensor:
    options = {"dtype": "float32", "ops": ops, **options}
    model = load_model(path, **options)
    hidden = model.forward(torch.tensor(TOKENS), layout_of([60], [60], [[0, 1, 2, 3]], 16), model.new_cache(4, 16))
    return model.logits(hidden)


def both(tmp_path: Path, family: str, *args: Any, **overrides: Any) -> tuple[Path, Path]:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, **overrides)
    return checkpoint, write_gguf(checkpoint, tmp_path / "model.gguf", family, *args)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_file_is_its_checkpoint(family: str, tmp_path: Path) -> None:
    # ggml's Gemma 2 has no head of its own.
    overrides = {"tie_word_embeddings": True} if family == "gemma2" else {}
    checkpoint, file = both(tmp_path, family, **overrides)
    torch.testing.assert_close(logits(file), reference_logits(checkpoint, TOKENS), atol=1e-4, rtol=0)
    ours, theirs = read_config(file), read_config(checkpoint)
    for field in ("architecture", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "tie_word_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert [layer.window for layer in ours.layers] == [layer.window for layer in theirs.layers]
    assert ours.eos_token_ids == theirs.eos_token_ids
    num_extra = 8 if family == "llama-llama3" else 0
    assert count_parameters(file, ours) == {None: load_model(file).num_parameters + num_extra}


@pytest.mark.parametrize("kind", [K.F16, K.BF16, K.Q4_0, K.Q4_1, K.Q5_0, K.Q5_1, K.Q8_0], ids=lambda kind: kind.name)
def test_formats(kind: K, tmp_path: Path) -> None:
    checkpoint, file = both(tmp_path, "llama", as_format(kind))
    found = logits(file)
    torch.testing.assert_close(found, reference_logits(checkpoint, TOKENS), atol=1e-4, rtol=0)
    coded = {scheme.bits for scheme in count_parameters(file, read_config(file)) if scheme is not None}
    assert coded == ({K.Q4_0: {4}, K.Q5_0: {5}, K.Q8_0: {8}}.get(kind, set()))
    torch.testing.assert_close(logits(file, ops=ReferenceOps()), found, atol=1e-4, rtol=0)


@needs_native
@pytest.mark.parametrize("kind", [K.Q4_0, K.Q8_0], ids=lambda kind: kind.name)
def test_codes_are_run_as_ggml_runs_them(kind: K, tmp_path: Path) -> None:
    _, file = both(tmp_path, "qwen2", as_format(kind))
    exact, found = logits(file), logits(file, ops=CPUOps())
    # Activations are rounded to 8 bits, to which weights of 8 bits add nothing.
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.05
    # What is left in floats, half as wide, is no further off.
    narrow = logits(file, ops=CPUOps(), dtype="auto")
    assert 1e-5 < (narrow - exact).norm() / exact.norm() < 0.05
    assert read_config(file).dtype == "bfloat16"
    assert load_model(file).kv_dtype == "bfloat16"


@pytest.mark.parametrize("kind", [K.Q4_K, K.Q5_K, K.Q6_K], ids=lambda kind: kind.name)
def test_k_formats(kind: K, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16}
    checkpoint, file = both(tmp_path, "llama", random_blocks(kind), **wide)
    torch.testing.assert_close(logits(file), reference_logits(checkpoint, TOKENS), atol=1e-4, rtol=1e-4)


def test_experts_in_blocks(tmp_path: Path) -> None:
    checkpoint, file = both(tmp_path, "mixtral", as_format(K.Q8_0))
    torch.testing.assert_close(logits(file), reference_logits(checkpoint, TOKENS), atol=1e-4, rtol=0)


def test_a_file_is_served_like_its_checkpoint(tmp_path: Path) -> None:
    checkpoint, file = both(tmp_path, "qwen3", as_format(K.Q8_0))
    engine = build_engine(file, step_tokens=16, ops=EXACT)
    deltas = run_to_end(engine, [greedy("a", TOKENS, 12), greedy("b", TOKENS[:9], 12)])
    assert tokens_of(deltas["a"]) == reference_greedy(checkpoint, TOKENS, 12)
    assert tokens_of(deltas["b"]) == reference_greedy(checkpoint, TOKENS[:9], 12)


def change(file: Path, change: Callable[[gguf.GGUFReader], None]) -> Path:
    """Change values of a file in place."""
    reader = gguf.GGUFReader(file, "r+")
    change(reader)
    reader.data.flush()
    return file


def test_suggested_sampling(tmp_path: Path) -> None:
    assert read_sampling_defaults(both(tmp_path, "llama")[1]) == SamplingDefaults()
    writer = gguf.GGUFWriter(tmp_path / "suggests.gguf", "llama")
    writer.add_sampling_temp(0.5)
    writer.add_sampling_top_k(20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_sampling_defaults(tmp_path / "suggests.gguf") == SamplingDefaults(temperature=0.5, top_k=20)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file whose header takes most of it."""
    small = {"hidden_size": 8, "intermediate_size": 4, "num_attention_heads": 2, "head_dim": 4}
    return both(tmp_path_factory.mktemp("pristine"), "gemma2", tie_word_embeddings=True, **small)[1].read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=3))
def test_damaged_files_load_or_are_refused(pristine: bytes, tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(pristine)
    for place, mask in flips:
        data[place % len(data)] ^= mask
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    for load in (load_model, Tokenizer.load, ChatTemplate.load):
        with suppress(ConfigError):
            load(path)


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    _, file = both(tmp_path, "llama")

    def heads(reader: gguf.GGUFReader) -> None:
        reader.fields["llama.attention.head_count"].parts[-1][0] = 3

    broken = change(Path(shutil.copy(file, tmp_path / "heads.gguf")), heads)
    with pytest.raises(ModelUnreadable, match=r"heads\.gguf: num_key_value_heads is 2"):
        load_model(broken)

    def width(reader: gguf.GGUFReader) -> None:
        reader.fields["llama.feed_forward_length"].parts[-1][0] = 97

    broken = change(Path(shutil.copy(file, tmp_path / "width.gguf")), width)
    with pytest.raises(ModelUnreadable, match=r"ffn_gate\.weight is \[96, 64\], and its metadata makes it \[97, 64\]"):
        load_model(broken)

    def name(reader: gguf.GGUFReader) -> None:
        reader.fields["general.architecture"].parts[-1][:] = np.frombuffer(b"parro", np.uint8)

    broken = change(Path(shutil.copy(file, tmp_path / "name.gguf")), name)
    with pytest.raises(ModelUnreadable, match="architecture 'parro' is not one Penstock reads from GGUF"):
        load_model(broken)
