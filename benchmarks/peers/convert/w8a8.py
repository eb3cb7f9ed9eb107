"""A bfloat16 directory with int8 projections, as vLLM reads them: `w8a8.py MODEL OUT`, run in vLLM's environment.

compressed-tensors' int-quantized layout: weights in 8 bits with a scale for each output, activations quantized token by
token while running; embedding and head stay bfloat16.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}


def convert(model: Path, out: Path) -> None:
    """Write ``out``."""
    out.mkdir(exist_ok=True)
    for file in model.glob("*.json"):
        shutil.copy(file, out)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
                "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
            }
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith(tuple(f"{projection}.weight" for projection in _PROJECTIONS)):
            scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().clamp(-127, 127).char()
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
