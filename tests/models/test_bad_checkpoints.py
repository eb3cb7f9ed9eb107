"""Checkpoints that are broken, incomplete or of a kind that is not run: one typed error that names file and remedy."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from penstock.errors import ConfigError, ModelUnreadable
from penstock.models import read_config, resolve_model
from penstock.models.decoder import load_model
from tests.tiny_models import make_checkpoint


@pytest.fixture
def broken(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama, to be damaged."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["ParrotForCausalLM"]},
            "ParrotForCausalLM is neither native nor one transformers knows",
        ),
        ({"architectures": None}, "architectures is not given"),
        ({"architectures": {"Parrot": 1}}, "a list of names"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', and Penstock needs a list"),
        ({"architectures": 7}, "a list of names"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [2, None]}, "a token id or a list of them"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**12}, "at most 10000"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_key_value_heads": 3}, "a divisor of the 4"),
        ({"head_dim": 15}, "an even number"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and Penstock needs silu"),
        ({"dtype": "float8_e4m3fn"}, "one of"),
        ({"rms_norm_eps": "small"}, "wrong kind"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "short_factor is None"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type is 'spiral'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_scaling.factor is None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2, "rope_theta": 1e4}}, "rope_scaling.factor is -2"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
        ({"rope_parameters": {"rope_theta": "big"}}, "wrong kind"),
    ],
)
def test_configs_that_cannot_be_run(broken: Path, changes: dict[str, Any], message: str) -> None:
    change_config(broken, **changes)
    with pytest.raises(ModelUnreadable, match=message) as caught:
        read_config(broken)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("window", [0, -1, "far", 2.5])
def test_windows_that_mean_nothing(window: object, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mistral")
    change_config(path, sliding_window=window)
    with pytest.raises(ModelUnreadable, match="sliding_window"):
        read_config(path)


def test_layer_types_of_another_depth(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen2-windows")
    change_config(path, layer_types=["sliding_attention"] * 5)
    with pytest.raises(ModelUnreadable, match="one for each of the 2 layers"):
        read_config(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\xff"])
def test_a_config_that_is_no_object(broken: Path, content: str) -> None:
    (broken / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelUnreadable, match=r"config\.json"):
        read_config(broken)


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"config\.json does not exist"):
        read_config(tmp_path)


def test_a_tensor_that_is_missing(broken: Path) -> None:
    def without_one(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    change_weights(broken, without_one)
    with pytest.raises(ModelUnreadable, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight: .* incomplete"):
        load_model(broken)


def test_more_layers_than_the_config_says(broken: Path) -> None:
    change_config(broken, num_hidden_layers=1)
    with pytest.raises(ModelUnreadable, match=r"tensors of a layer 1 \(model.layers.1\..*there are 1 layers"):
        load_model(broken)


def test_a_tensor_of_another_shape(broken: Path) -> None:
    change_config(broken, intermediate_size=97)
    with pytest.raises(ModelUnreadable, match=r"is \[96, 64\], and config\.json makes it \[97, 64\]"):
        load_model(broken)


def test_a_tensor_that_holds_no_real_numbers(broken: Path) -> None:
    def to_codes(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    change_weights(broken, to_codes)
    with pytest.raises(ModelUnreadable, match=r"torch\.int8; weights must be bf16, fp16 or fp32"):
        load_model(broken)


def test_no_weights_or_only_pickled_ones(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelUnreadable, match="no weights"):
        load_model(broken)
    (broken / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnreadable, match="convert it to safetensors"):
        load_model(broken)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index of shards"),
        ('{"weight_map": []}', "is not an index of shards"),
        ('{"weight_map": {"a": 3}}', "names the shard 3, which is not there"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "which is not there; fetch it"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is not there"),
    ],
)
def test_indices_of_shards(broken: Path, index: str, message: str) -> None:
    (broken / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelUnreadable, match=message):
        load_model(broken)


def test_a_header_that_points_past_the_end(broken: Path) -> None:
    file = broken / "model.safetensors"
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["model.norm.weight"]["data_offsets"] = [0, 10**9]
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])
    with pytest.raises(ModelUnreadable, match="broken or cut short"):
        load_model(broken)


def load_or_refuse(path: Path) -> None:
    """Load it, or fail with an error an operator can act on; anything else is a bug."""
    try:
        load_model(path)
    except ConfigError:
        return


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 300_000), flips=st.lists(st.tuples(st.integers(0, 1500), st.integers(1, 255)), max_size=3))
@example(cut=300_000, flips=[])
@example(cut=7, flips=[])
@example(cut=300_000, flips=[(7, 255)])
def test_damaged_weights_load_or_are_refused(broken: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    pristine = broken / "pristine"
    file = broken / "model.safetensors"
    if not pristine.exists():
        pristine.write_bytes(file.read_bytes())
    data = bytearray(pristine.read_bytes()[:cut])
    for place, change in flips:
        if place < len(data):
            data[place] ^= change
    file.write_bytes(data)
    load_or_refuse(broken)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_config_loads_or_is_refused(broken: Path, data: st.DataObject) -> None:
    pristine = broken / "pristine.json"
    if not pristine.exists():
        shutil.copy(broken / "config.json", pristine)
    config = json.loads(pristine.read_text())
    key = data.draw(st.sampled_from(sorted([*config, "rope_scaling", "sliding_window", "quantization_config"])))
    config[key] = data.draw(JSON)
    (broken / "config.json").write_text(json.dumps(config))
    load_or_refuse(broken)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "there is no model 'nonsense'"),
        ("/no/such/place", "there is no model"),
        ("a/b/c", "there is no model"),
        (__file__, "is a file, and not a GGUF one; give the directory"),
        (str(Path(__file__).parent), "is no model: a directory in Hugging Face layout has a config.json"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelUnreadable, match=message):
        resolve_model(name)


def test_a_hub_id_without_a_hub_is_one_error() -> None:
    code = (
        "from penstock.models import resolve_model\n"
        "from penstock.errors import ModelUnreadable\n"
        "try:\n    resolve_model('some-organisation/some-model')\n"
        "except ModelUnreadable as error:\n    print(error.message)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "cannot be had from the hub" in result.stdout
    assert "or give a directory" in result.stdout
