"""Whole checkpoints: written in a layout from codes and floats, and widened again."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.errors import InvalidSetting, ModelUnreadable
from penstock.quant.codes import QuantizedWeight, Scheme, dequantize
from penstock.quant.compressed_tensors import KV_CACHE_SCHEME
from penstock.quant.layouts import layout_to_write
from penstock.quant.reader import QuantizedModules, StoredTensors

_SHARD_BYTES = 4 << 30
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
_NOT_COPIED = ("config.json", "README.md", "compression.json")
"""What is not copied from a model's directory to another: it would be another model's weights, figures and origin"""


def write_checkpoint(
    directory: Path,
    source: Path,
    weights: Iterable[tuple[str, QuantizedWeight | Tensor]],
    layout: str = "compressed-tensors",
    *,
    shard_bytes: int = _SHARD_BYTES,
    changes: Mapping[str, Any] | None = None,
    cache_scales: bool = False,
) -> None:
    """Write the model in directory ``source`` with other ``weights`` to ``directory``, which must not have one.

    ``weights`` are, by name and one at a time, projections in codes (``model.layers.0.mlp.up_proj``) and other tensors
    as they are (``model.norm.weight``). ``layout`` is one of ``LAYOUTS``; without any codes it says nothing. No more
    than ``shard_bytes`` and a tensor are held. ``changes`` are those to make in config.json, which comes last: a
    directory with one is whole. With ``cache_scales`` there are static scales of keys and values among the tensors, and
    the layout is compressed-tensors.
    Raises ``InvalidSetting`` for what the layout cannot say.
    """
    if directory.exists() and any(directory.iterdir()):
        raise InvalidSetting(f"{directory} is not empty; choose another directory, or remove what is in it")
    directory.mkdir(parents=True, exist_ok=True)
    form = layout_to_write(layout)
    schemes: dict[str, Scheme] = {}
    untouched: dict[str, torch.dtype] = {}
    """Of matrices"""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            if isinstance(weight, QuantizedWeight):
                schemes[name] = weight.scheme
                yield from ((f"{name}.{part}", tensor) for part, tensor in form.pack(weight).items())
            else:
                if weight.ndim == 2 and name.endswith(".weight"):
                    untouched[name.removesuffix(".weight")] = weight.dtype
                yield name, weight

    _write_shards(directory, tensors(), shard_bytes)
    config = _read_config(source) | dict(changes or {})
    config.pop("quantization_config", None)
    if not schemes and untouched:
        config.pop("torch_dtype", None)
        config["dtype"] = str(next(iter(untouched.values()))).removeprefix("torch.")
    if schemes or cache_scales:
        # A head that is not among the tensors is the embedding, and must not be taken for a projection in codes.
        left_out = [*untouched, *(["lm_head"] if "lm_head" not in {*schemes, *untouched} else [])]
        config["quantization_config"] = form.describe(schemes, left_out)
        if cache_scales:
            config["quantization_config"] |= {"kv_cache_scheme": KV_CACHE_SCHEME}
    _copy_others(source, directory)
    unfinished = directory / "config.json.unfinished"
    unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in directory.glob("*.safetensors"):
        # Written for nobody but the owner, however others may read what this process writes.
        shutil.copymode(unfinished, file)
    unfinished.rename(directory / "config.json")


def widen(stored: StoredTensors, modules: QuantizedModules, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a quantized checkpoint, one at a time: codes as the floats in ``dtype`` they stand for."""
    parts = {part for module in modules for part in modules.parts(module)}
    for module in modules:
        yield f"{module}.weight", dequantize(modules.weight(module)).to(dtype)
    for name in stored:
        if name not in parts:
            tensor = stored.read(name)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write ``model.safetensors``, or shards of at most ``shard_bytes`` or a tensor, with their index."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total_bytes = pending_bytes = 0

    def flush() -> None:
        save_file(pending, directory / f"shard-{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        # Tensors that may share their memory cannot be stored beside each other.
        is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
        pending[name] = tensor.clone() if is_part else tensor.contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "shard-0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{number}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnreadable(f"{source / 'config.json'} cannot be read: {error}; fetch the file again") from error
    return config


def _copy_others(source: Path, directory: Path) -> None:
    """Copy what is beside the weights: tokenizer, chat template, what is suggested for sampling, licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in _NOT_COPIED and not any(map(file.match, _WEIGHTS)):
            shutil.copyfile(file, directory / file.name)
