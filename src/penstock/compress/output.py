"""The finished model, from the layers that are done and what no layer holds; and reading it back.

A finished layer is kept in tensors by name: ``MODULE.codes``, ``MODULE.scales`` and ``MODULE.zeros`` of matrices in
codes, ``MODULE.inputs``, a scale and a zero, of what static activations are rounded to; and tensors that changed, by
their own names.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from penstock.compress.checkpoint import Checkpoint, layer_of
from penstock.compress.layer import CompressedLayer
from penstock.kernels import InputCodes
from penstock.quant import QuantizedWeight, Scheme
from penstock.quant.writing import write_checkpoint

_PARTS = ("codes", "scales", "zeros", "inputs")
_SHARD_BYTES = 256 << 20
"""Little beside a layer's weights in float32, which is what memory is counted by"""


def tensors_of(layer: CompressedLayer) -> dict[str, Tensor]:
    """Return what to keep of a finished layer."""
    tensors = dict(layer.changed)
    for module, weight in layer.codes.items():
        tensors[f"{module}.codes"], tensors[f"{module}.scales"] = _own(weight.codes), _own(weight.scales)
        if weight.zeros is not None:
            tensors[f"{module}.zeros"] = _own(weight.zeros)
    for module, inputs in layer.inputs.items():
        tensors[f"{module}.inputs"] = torch.tensor([inputs.scale, inputs.zero])
    return tensors


def write_model(
    directory: Path,
    checkpoint: Checkpoint,
    layers: Mapping[int, Path],
    ends: Path,
    schemes: Mapping[str, Scheme],
    layout: str,
    changes: Mapping[str, Any],
    *,
    cache_scales: bool = False,
) -> None:
    """Write the model to ``directory``, matrices of ``schemes``, by module, being in codes in ``layers`` and ``ends``.

    The files ``layers``, by number, follow each other in the model, which has no others; ``ends`` is the file of what
    is in no layer; ``changes`` are those of config.json. With ``cache_scales`` layers have those of keys and values.
    Raises ``InvalidSetting`` for what the ``layout`` cannot say.
    """

    numbers = {layer: number for number, layer in enumerate(sorted(layers))}

    def weights() -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
        for name in checkpoint.names:
            layer = layer_of(name)
            module = name.removesuffix(".weight")
            stored = checkpoint.stored_name(name)
            stored_module = stored.removesuffix(".weight")
            if layer is None and module in schemes and name.endswith(".weight"):
                with safe_open(ends, framework="pt") as done:
                    yield stored_module, read_codes(done, module, schemes[module])
                continue
            if layer is None:
                # A tied head's copy would differ from what has become of the table.
                if not (name == "lm_head.weight" and checkpoint.config.tie_word_embeddings):
                    yield stored, checkpoint.read(name)
                continue
            if layer not in layers:
                continue
            with safe_open(layers[layer], framework="pt") as done:
                there = set(done.keys())
                if module in schemes and name.endswith(".weight"):
                    yield stored_module, read_codes(done, module, schemes[module])
                else:
                    written = stored.replace(f"layers.{layer}.", f"layers.{numbers[layer]}.", 1)
                    yield written, done.get_tensor(name) if name in there else checkpoint.read(name)
        of_codes = {f"{module}.{part}" for module in schemes for part in _PARTS}
        for file in layers.values():
            with safe_open(file, framework="pt") as done:
                for name in sorted(set(done.keys()) - of_codes - set(checkpoint.names)):
                    yield checkpoint.stored_name(name), done.get_tensor(name)

    write_checkpoint(
        directory,
        checkpoint.path,
        weights(),
        layout,
        shard_bytes=_SHARD_BYTES,
        changes=changes,
        cache_scales=cache_scales,
    )


def read_codes(done: Any, module: str, scheme: Scheme) -> QuantizedWeight:
    """Return a module's weight from the opened file of what is finished."""
    inputs = None
    if scheme.activations == "static":
        scale, zero = done.get_tensor(f"{module}.inputs").tolist()
        inputs = InputCodes(scale, int(zero))
    return QuantizedWeight(
        scheme=scheme,
        codes=done.get_tensor(f"{module}.codes"),
        scales=done.get_tensor(f"{module}.scales"),
        zeros=None if scheme.symmetric else done.get_tensor(f"{module}.zeros"),
        inputs=inputs,
    )


def _own(tensor: Tensor) -> Tensor:
    """Return a copy: rows of one unit share their memory, which files cannot say."""
    return tensor.clone(memory_format=torch.contiguous_format)
