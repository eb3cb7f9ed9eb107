"""What loading a checkpoint leaves in memory, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.kernels.native import NATIVE

V, E = 40_000, 512
_MEASURE = """
import json, sys
from pathlib import Path
import torch
from penstock.kernels import ops_for
from penstock.models.decoder import load_model

def kib(*names):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) for name in names]

path, quantize = Path(sys.argv[1]), sys.argv[2] if sys.argv[2] != "none" else None
ops = ops_for("bfloat16", quantize)
(before,) = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_model(path, ops=ops, max_tokens=64)
loaded = kib("VmRSS", "VmHWM")
for token_ids in torch.arange(model.config.vocab_size).split(500):
    model._ends.embed(token_ids)
(read,) = kib("VmRSS")
print(json.dumps([1024 * (value - before) for value in (*loaded, read)] + [model.num_parameters]))
"""


def _write_model(path: Path) -> None:
    F, layers = 1024, 4
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": E,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.{norm}_layernorm.weight": (E,) for norm in ("input", "post_attention")}
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (E, E) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (F, E) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (E, F)
    weights = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.skipif(NATIVE is None, reason="codes take native kernels")
def test_loading_leaves_little_but_codes(tmp_path: Path) -> None:
    _write_model(tmp_path)
    resident, peak, read, num_parameters = _measure(tmp_path, "int8")
    codes, embedding = num_parameters * 1.04, V * E * 2
    # The tied embedding was read to be packed; beside the codes it became, only rows that are looked up are kept.
    assert resident < codes + embedding / 2
    assert peak < 1.25 * codes + embedding
    assert read > resident + embedding / 2


@pytest.mark.skipif(NATIVE is None, reason="the packed head is native kernels'")
def test_a_tied_embedding_is_held_once(tmp_path: Path) -> None:
    _write_model(tmp_path)
    resident, peak, read, num_parameters = _measure(tmp_path, "none")
    weights, embedding = num_parameters * 2, V * E * 2
    assert peak < 1.1 * weights + embedding
    assert resident < weights + embedding / 2
    assert read < resident + embedding / 4


def _measure(path: Path, quantize: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), quantize], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures: list[int] = json.loads(done.stdout)
    return figures
