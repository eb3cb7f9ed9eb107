"""Architectures without a native family, in transformers' code over our cache: the extra ``penstock[transformers]``.

transformers calls one function for attention, by name. Ours writes keys and values to the paged cache and attends from
there, so that packed batches, chunks and the prefix cache work as for native families. Everything else is upstream's
code, with its projections replaced by our kernels' products. Before a model is served it has to agree with upstream's
own attention on a small batch: what keeps state elsewhere, or adds to its scores in a way of its own, does not, and is
refused.

T packed tokens, R rows, E hidden width, V vocabulary, H query heads, G KV heads, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.errors import MissingExtra, ModelUnreadable
from penstock.kernels import Attention, BatchLayout, KVBlocks, Linear, Ops
from penstock.kernels.dtypes import ELEMENT_BYTES, torch_dtype
from penstock.lean_torch import load_deferred
from penstock.models.config import LayerConfig, ModelConfig
from penstock.models.config_json import ConfigJson
from penstock.models.lora import Adapted, Adapter
from penstock.models.model import new_cache
from penstock.models.vision.encoder import Inserted

_NAME = "penstock"
_STRETCHED = ("dynamic", "longrope")
"""Rotations whose angles depend, in transformers, on what else is in the batch."""


class _AttentionCall(Protocol):
    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """Return [T, H, Dv] from queries [T, H, D], keys [T, G, D] and values [T, G, Dv]."""


_call: ContextVar[_AttentionCall] = ContextVar("attention")
"""What attention means in the forward pass that runs."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: heads [1, H, T, D] in, [1, T, H, Dv] out."""
    rows = (heads[0].transpose(0, 1) for heads in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _call.get()(int(module.layer_idx), *rows, scale=scale, window=sliding_window, cap=softcap)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


def read_upstream_config(raw: ConfigJson, architecture: str) -> ModelConfig:
    """Return the sizes of a model that transformers knows, seen in a forward pass without weights.

    Raises ``MissingExtra`` without transformers, ``ModelUnreadable`` for what cannot be run through it.
    """
    transformers = _transformers(raw, architecture)
    config = _upstream_config(transformers, raw.path.parent)
    if not hasattr(transformers, architecture):
        raise ModelUnreadable(f"{raw.path}: architecture {architecture} is neither native nor one transformers knows")
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") in _STRETCHED:
            raise raw.bad("rope_parameters.rope_type", parameters["rope_type"], "another for this architecture")
    seen: list[tuple[int, Tensor, Tensor, int | None]] = []

    def watch(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        seen.append((layer, q, k, window))
        return q.new_empty(*q.shape[:2], v.shape[-1])

    try:
        with torch.device("meta"), _calling(watch), torch.inference_mode():
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=_NAME, experts_implementation="batched_mm"
            )
            ids = torch.zeros(1, 2, dtype=torch.int64)
            logits = model(input_ids=ids, position_ids=ids, use_cache=False).logits
    except Exception as error:  # upstream's code, on a configuration it may never have seen
        raise ModelUnreadable(
            f"{raw.path}: {architecture} cannot be run through transformers here "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error
    shapes = {(q.shape[1], k.shape[1], q.shape[2]) for _, q, k, _ in seen}
    if len(shapes) != 1 or [layer for layer, *_ in seen] != list(range(len(seen))):
        raise ModelUnreadable(f"{raw.path}: the layers of {architecture} do not all attend alike; Penstock needs that")
    ((num_heads, num_kv_heads, head_dim),) = shapes
    return ModelConfig(
        architecture=architecture,
        is_native=False,
        vocab_size=logits.shape[-1],
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=tuple(LayerConfig(window=window, rope=None) for *_, window in seen),
        max_positions=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        eos_token_ids=raw.eos_token_ids(),
        dtype=raw.dtype(),
    )


class UpstreamModel:
    """A decoder-only language model in transformers' code."""

    def __init__(self, path: Path, config: ModelConfig, dtype: str, kv_dtype: str, ops: Ops) -> None:
        """Load; raises ``ModelUnreadable`` if it cannot be, or is not itself over our cache."""
        self.config = config
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self._ops = ops
        self._activation_dtype = torch_dtype(ops.activation_dtype(dtype))
        transformers = _transformers_module()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch_dtype(dtype), local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # whatever upstream's loader makes of a broken checkpoint
            raise ModelUnreadable(f"{path} cannot be loaded by transformers: {error}; fetch it again") from error
        self._model = model.eval()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        expected = self._own_logits(_PROBES)
        self._model.set_attn_implementation(_NAME)
        self._body = getattr(self._model, self._model.base_model_prefix)
        try:
            found = self._paged_logits()
        except Exception as error:  # upstream's code, used in a way it may not have been written for
            raise ModelUnreadable(f"{path}: {config.architecture} does not run over a paged cache: {error}") from error
        self._compare(path, expected, found)
        _replace_linears(self._model, ops)
        self._model.to(self._activation_dtype)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters in the dtype they run in."""
        num_bytes: int = self.num_parameters * ELEMENT_BYTES[self.dtype]
        return num_bytes

    def new_cache(self, num_blocks: int, block_size: int) -> list[KVBlocks]:
        """Return zeroed cache blocks for each layer; memory is taken page by page as it is first written."""
        return new_cache(self.config, self._ops, self.kv_dtype, num_blocks, block_size)

    def load_adapter(self, path: Path) -> Adapter:
        """Never asked for: such a model is not loaded to be adaptable."""
        raise NotImplementedError(path)

    def forward(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """See ``LanguageModel.forward``; all tokens go through all layers."""
        hidden: Tensor = self._run(token_ids, layout, cache).last_hidden_state[0]
        return hidden if rows is None else hidden[rows]

    def replay(self, cache: list[KVBlocks], block_size: int) -> None:
        """Return nothing: what transformers' code does between native ops cannot be recorded."""

    def hidden_states(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
    ) -> Iterator[Tensor]:
        """Yield what upstream keeps: after each layer but the last, and the final ones."""
        output = self._run(token_ids, layout, cache, output_hidden_states=True)
        # The first are the embeddings; the last may or may not be the final ones.
        for hidden in output.hidden_states[1:-1]:
            yield hidden[0]
        yield output.last_hidden_state[0]

    def _run(self, token_ids: Tensor, layout: BatchLayout, cache: list[KVBlocks], **wanted: bool) -> Any:
        with _calling(_PagedAttention(self._ops, layout, cache, self._activation_dtype)):
            return self._body(
                input_ids=token_ids.unsqueeze(0), position_ids=layout.positions.unsqueeze(0), use_cache=False, **wanted
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 from ``hidden`` [R, E]."""
        # Upstream's own head, with all it does to logits: its body is asked to hand back what it is given.
        prefix = self._model.base_model_prefix
        setattr(self._model, prefix, _HandsBack())
        try:
            logits: Tensor = self._model(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        finally:
            setattr(self._model, prefix, self._body)
        return logits[0].float()

    @torch.inference_mode()
    def _own_logits(self, prompts: list[list[int]]) -> Tensor:
        """Return what upstream's attention makes of each prompt, one after another: [T, V]."""
        outputs = [self._model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]
        return torch.cat(outputs).float()

    @torch.inference_mode()
    def _paged_logits(self) -> Tensor:
        """Return what our attention makes of the same prompts, packed and in two chunks: [T, V]."""
        block_size = 16
        # Of the weights' dtype, because upstream rounds to no codes.
        cache = new_cache(self.config, self._ops, self.dtype, len(_PROBES), block_size)
        parts: list[list[Tensor]] = [[] for _ in _PROBES]
        for begin, end in ((0, 4), (4, 9)):
            chunks = [prompt[begin:end] for prompt in _PROBES]
            sizes, ends = [len(chunk) for chunk in chunks], [begin + len(chunk) for chunk in chunks]
            layout = BatchLayout.pack(sizes, ends, [[i] for i in range(len(_PROBES))], block_size)
            token_ids = torch.tensor([token_id for chunk in chunks for token_id in chunk])
            logits = self.logits(self.forward(token_ids, layout, cache))
            for part, rows in zip(parts, torch.split(logits, sizes), strict=True):
                part.append(rows)
        return torch.cat([rows for part in parts for rows in part])

    def _compare(self, path: Path, expected: Tensor, found: Tensor) -> None:
        worst = float((found - expected).abs().max() / expected.std())
        # In half precision, upstream rounds where our attention does not.
        if not worst <= (1e-3 if self.dtype == "float32" else 0.2):
            raise ModelUnreadable(
                f"{path}: {self.config.architecture} is not itself over a paged cache (logits differ by {worst:.2g} of "
                "their deviation): its layers keep or add something that Penstock does not know, so it cannot be served"
            )


_PROBES = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1]]
"""Tokens any vocabulary has, in sequences of different lengths."""


class _PagedAttention:
    """One step's attention over the cache."""

    def __init__(self, ops: Ops, layout: BatchLayout, cache: list[KVBlocks], dtype: torch.dtype) -> None:
        """``dtype`` is what activations are computed in."""
        self._ops = ops
        self._dtype = dtype
        self._layout = layout
        self._cache = cache
        self._plans: dict[tuple[object, ...], Attention] = {}
        self._unrotated: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        (T, H, D), G = q.shape, k.shape[1]
        width = v.shape[-1]
        if width < D:
            v = F.pad(v, (0, D - width))
        kv = self._cache[layer]
        if self._unrotated is None:
            self._unrotated = torch.ones(T, 1, D), torch.zeros(T, 1, D)
        qkv = torch.cat([q, k, v], 1).view(T, -1).to(self._dtype)
        rotated = self._ops.rope_write_kv(
            qkv, kv, self._layout, *self._unrotated, num_heads=H, num_kv_heads=G, norms=None
        )
        key = (H, G, D, window, cap)
        if key not in self._plans:
            self._plans[key] = self._ops.plan_attention(
                self._layout, num_heads=H, num_kv_heads=G, head_dim=D, window=window, score_cap=cap
            )
        return self._plans[key](rotated, kv, scale=scale)[..., :width].to(q.dtype)


class _Output:
    """A body's output that has hidden states and, whatever it is asked for beside them, nothing."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, _: str) -> None:
        return None

    def __getitem__(self, _: Literal[0]) -> Tensor:
        return self.last_hidden_state


class _HandsBack(nn.Module):
    """Stands in for a model's body."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _Output:
        """Return the embeddings as if they were the last hidden states."""
        return _Output(inputs_embeds)

    @property
    def decoder(self) -> "_HandsBack":
        """Return itself, for architectures whose head asks for the decoder within the body."""
        return self


class _PackedLinear(nn.Module):
    """A projection computed by our kernels."""

    def __init__(self, linear: Linear, num_outputs: int) -> None:
        super().__init__()
        self._linear = linear
        self._num_outputs = num_outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] from ``x`` [..., K]."""
        return self._linear(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], self._num_outputs)


def _replace_linears(model: nn.Module, ops: Ops) -> None:
    """Have every ``nn.Linear`` of ``model`` computed by ``ops``."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                bias = None if child.bias is None else child.bias.detach()
                packed = _PackedLinear(ops.prepare_linear(child.weight.detach(), bias), child.out_features)
                setattr(parent, name, packed)


@contextmanager
def _calling(call: _AttentionCall) -> Iterator[None]:
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def _transformers(raw: ConfigJson, architecture: str) -> Any:
    if find_spec("transformers") is None:
        raise MissingExtra(
            f"{raw.path}: architecture {architecture} is not native; to run it in transformers' code install the "
            "extra: pip install 'penstock[transformers]'"
        )
    return _transformers_module()


def _transformers_module() -> Any:
    """Import transformers, which takes seconds, and register our attention with it."""
    # Its models are run on the meta device, and may bring code that traces.
    load_deferred()
    import transformers

    transformers.AttentionInterface.register(_NAME, _attention)
    return transformers


def _upstream_config(transformers: Any, path: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True).get_text_config(decoder=True)
    except Exception as error:  # upstream checks with errors of many kinds
        raise ModelUnreadable(f"{path / 'config.json'} is refused by transformers: {error}") from error


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    yield parameters
    yield from (value for value in parameters.values() if isinstance(value, dict))
