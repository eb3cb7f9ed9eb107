"""LoRA adapters as PEFT writes them, with random weights, and checkpoints they are merged into."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


def write_adapter(
    path: Path, checkpoint: Path, targets: tuple[str, ...] = ALL, *, rank: int = 4, seed: int = 0, **settings: Any
) -> Path:
    """Write an adapter of the checkpoint's projections called one of ``targets`` to directory ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(targets), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if name.split(".")[-2] in targets and name.endswith(".weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.2
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.2
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def merged(path: Path, checkpoint: Path, adapter: Path) -> Path:
    """Write the checkpoint with the adapter merged into its weights to directory ``path``."""
    shutil.copytree(checkpoint, path)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"] ** (0.5 if settings.get("use_rslora") else 1)
    tensors, low = load_file(path / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in low.items():
        if name.endswith("lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            weight = f"{stem.removeprefix('base_model.model.')}.weight"
            tensors[weight] = tensors[weight] + scale * low[f"{stem}.lora_B.weight"] @ a
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path
