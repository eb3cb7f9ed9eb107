"""A GGUF file's tensors by the names a checkpoint would give them."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from penstock.errors import ModelUnreadable
from penstock.gguf.dequantize import FORMATS
from penstock.gguf.reader import TensorInfo, read_gguf
from penstock.kernels.dtypes import torch_dtype
from penstock.kernels.tensor import Tensor
from penstock.quant import QuantizedWeight, Scheme

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "experts.gate_proj": "ffn_gate_exps",
    "experts.up_proj": "ffn_up_exps",
    "experts.down_proj": "ffn_down_exps",
    "experts.w1": "ffn_gate_exps",
    "experts.w3": "ffn_up_exps",
    "experts.w2": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_SANDWICH_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Gemma's"""


class GGUFWeights:
    """All tensors of a file, by the names of a checkpoint. A context manager; tensors taken from it are copies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = read_gguf(path)
        name = str(self._file.metadata.get("general.architecture"))
        self._names = _NAMES | _SANDWICH_NAMES if name.startswith("gemma") else _NAMES
        self._interleaved_heads = self._file.metadata.get(f"{name}.attention.head_count") if name == "llama" else None
        self._interleaved_kv_heads = self._file.metadata.get(f"{name}.attention.head_count_kv", self._interleaved_heads)
        self._unused = set(self._file.tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def unused(self) -> Iterator[str]:
        """Names, as the file has them, that nobody took."""
        return iter(sorted(self._unused))

    def sizes(self) -> Iterator[tuple[str, int, Scheme | None]]:
        """Yield what the file has, by its names; see ``StoredTensors``."""
        for name, info in self._file.tensors.items():
            yield name, math.prod(info.shape), _scheme(info)

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return the tensor a checkpoint would call ``name``, dequantized, in ``dtype``.

        Raises ``ModelUnreadable`` if it is missing or not of ``shape``.
        """
        ours, expert = self._find(name, shape)
        tensor = torch.from_numpy(self._file.tensor(ours, expert))
        order = self._order(name, shape[0])
        return (tensor if order is None else tensor[order]).to(torch_dtype(dtype))

    def take_codes(self, module: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """Return the weight of ``module`` if its format is one of a code and a scale; see ``TensorSource``."""
        name = f"{module}.weight"
        ours, expert = self._find(name, shape)
        scheme = _scheme(self._file.tensors[ours])
        if scheme is None:
            return None
        codes, scales = (torch.from_numpy(array) for array in self._file.codes(ours, expert))
        weight = QuantizedWeight(scheme=scheme, codes=codes, scales=scales)
        order = self._order(name, shape[0])
        return weight if order is None else weight.rows(order)

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[str, int | None]:
        """Return what the file calls a tensor, and which part of that it is, if it is an expert's."""
        ours, expert = self._translate(name)
        info = self._file.tensors.get(ours)
        if info is None:
            raise ModelUnreadable(f"{self._path} has no tensor {ours}: the file is incomplete, or of an older layout")
        found = info.shape if expert is None else info.shape[1:]
        if found != shape or (expert is not None and expert >= info.shape[0]):
            raise ModelUnreadable(
                f"{self._path}: {ours} is {list(info.shape)}, and its metadata makes it {list(shape)}; fetch it again"
            )
        self._unused.discard(ours)
        return ours, expert

    def _order(self, name: str, num_rows: int) -> Tensor | None:
        """Return the order of rows that undoes what files of Llama have: pairs to rotate side by side, instead of half
        a head apart. None: rows are as they should be.
        """
        if self._interleaved_heads is None:
            return None
        heads = {"q_proj": self._interleaved_heads, "k_proj": self._interleaved_kv_heads}.get(name.split(".")[-2])
        return None if heads is None else torch.arange(num_rows).view(heads, -1, 2).transpose(1, 2).flatten()

    def _translate(self, name: str) -> tuple[str, int | None]:
        """Return the file's name, and which part of the tensor it is, if it is an expert's."""
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        stem, kind = (layer[2] if layer else name).rsplit(".", 1)
        expert = re.fullmatch(r".*\.experts\.(\d+)\.(\w+)", stem)
        if expert:
            stem = f"experts.{expert[2]}"
        prefix = f"blk.{layer[1]}." if layer else ""
        return f"{prefix}{self._names.get(stem, stem)}.{kind}", int(expert[1]) if expert else None


def _scheme(info: TensorInfo) -> Scheme | None:
    """Return how a matrix is quantized, if its format is one of a code and a scale.

    Activations are meant to be rounded, because ggml rounds those that meet such a matrix.
    """
    form = FORMATS[info.format]
    if form.codes is None:
        return None
    return Scheme(bits=form.codes.bits, group=form.block_elements, activations="dynamic")
