"""The decoder of the native families, all of it loaded, and how a model of any family is loaded.

T packed tokens, R rows, E hidden width, V vocabulary.
"""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from penstock.errors import InvalidSetting, ModelUnreadable
from penstock.kernels import BatchLayout, KVBlocks, Ops, Replay, ops_for
from penstock.kernels.tensor import Tensor
from penstock.models.ahead import Ahead
from penstock.models.config import DTYPES, ModelConfig
from penstock.models.families import read_config
from penstock.models.files import is_of_seeing, plain_name
from penstock.models.frame import DecoderBody, DecoderEnds, DecoderLayer
from penstock.models.lora import Adapted, Adapter, read_adapter
from penstock.models.model import LanguageModel, new_cache
from penstock.models.parts import Loader
from penstock.models.vision.encoder import Inserted
from penstock.models.weights import TensorSource, open_weights
from penstock.quant import Scheme
from penstock.telemetry import get_logger

_log = get_logger(__name__)

_EMBEDDING_NAMES = ("model.embed_tokens.weight", "token_embd.weight")

_CACHE_SCALES = (".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale")
"""Static ones. They are not used: 8-bit keys and values have a scale for each token and head here, which is finer."""

_SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

KV_DTYPES = ("float32", "bfloat16", "int8")
"""What keys and values can be cached in, whatever the weights' dtype."""


class DecoderModel:
    """A loaded decoder-only language model."""

    def __init__(
        self,
        config: ModelConfig,
        weights: TensorSource,
        dtype: str,
        kv_dtype: str,
        ops: Ops,
        *,
        max_tokens: int | None = None,
        adaptable: bool = False,
    ) -> None:
        """Load; ``max_tokens`` is the longest sequence that will be run, if it is less than the model can hold.

        ``adaptable`` makes ``load_adapter`` possible, and the feed-forward a little slower.
        """
        self.config = config
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self._ops = ops
        self._adaptable = adaptable
        loader = Loader(config, weights, dtype, ops, adaptable=adaptable)
        self._ends = DecoderEnds(loader)
        self._body = DecoderBody(config, ops, max_tokens)
        self._layers = [DecoderLayer.load(loader, index) for index in range(config.num_layers)]
        self.num_parameters, self.weights_bytes = loader.num_parameters, loader.weights_bytes

    def new_cache(self, num_blocks: int, block_size: int) -> list[KVBlocks]:
        """Return zeroed cache blocks for each layer; memory is taken page by page as it is first written."""
        return new_cache(self.config, self._ops, self.kv_dtype, num_blocks, block_size)

    def load_adapter(self, path: Path) -> Adapter:
        """Return the LoRA adapter in directory ``path``, for ``forward``. Raises ``ModelUnreadable``."""
        assert self._adaptable, "the model was loaded without room for adapters"
        with torch.inference_mode():
            return read_adapter(path, self.config, self._ops, self.dtype)

    def forward(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return final normed hidden states of ``token_ids`` [T] int64; see ``LanguageModel.forward``."""
        if rows is None or adapted:
            hidden = deque(self.hidden_states(token_ids, layout, cache, adapted, inserted), maxlen=1)[0]
            return hidden if rows is None else hidden[rows]
        x_TE, mixed = self._mix(token_ids, layout, cache, inserted)
        return self._finish(x_TE[rows], mixed[rows]) if len(rows) else x_TE[:0]

    def hidden_states(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
    ) -> Iterator[Tensor]:
        """Yield what ``forward`` computes on its way; see ``LanguageModel.hidden_states``."""
        step, x_TE = self._body.begin(layout, adapted), self._embed(token_ids, inserted)
        for layer, kv in zip(self._layers, cache, strict=True):
            x_TE = self._body.run_layer(layer, x_TE, kv, step)
            yield x_TE
        yield self._ends.finish(x_TE)

    def _embed(self, token_ids: Tensor, inserted: Inserted | None) -> Tensor:
        x_TE = self._ends.embed(token_ids)
        if inserted is not None:
            x_TE[inserted.rows] = inserted.features.to(x_TE.dtype)
        return x_TE

    def _mix(
        self, token_ids: Tensor, layout: BatchLayout, cache: list[KVBlocks], inserted: Inserted | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the last layer reads [T, E] and what its heads make of it [T, H * D]: no token needs another's
        after that."""
        step, x_TE = self._body.begin(layout), self._embed(token_ids, inserted)
        for layer, kv in zip(self._layers[:-1], cache, strict=False):
            x_TE = self._body.run_layer(layer, x_TE, kv, step)
        return x_TE, self._body.mix(self._layers[-1], x_TE, cache[-1], step)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Return the final hidden states [R, E] of rows of what ``_mix`` returns."""
        return self._ends.finish(self._body.finish_layer(self._layers[-1], x, mixed))

    def replay(self, cache: list[KVBlocks], block_size: int) -> Replay | None:
        """Return a faster ``forward`` over ``cache``, for steps without adapters; None where there is none."""
        return self._ops.record(partial(self._mix, cache=cache), self._finish, self.logits, block_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 from ``hidden`` [R, E]."""
        return self._ends.logits(hidden)


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    ops: Ops | None = None,
    max_tokens: int | None = None,
    adaptable: bool = False,
    ahead: Ahead | None = None,
) -> LanguageModel:
    """Load the model in directory or GGUF file ``path``.

    ``max_tokens`` is the longest sequence that will be run; None: what it can hold. ``adaptable``: adapters may come.
    ``ahead`` is what was begun already, the same that ``ops`` have.

    Raises ``ModelUnreadable`` if the checkpoint is incomplete or broken, ``InvalidSetting`` for an unknown dtype.
    """
    config = read_config(path)
    dtype = run_dtype(config, dtype)
    kv_dtype = cache_dtype(dtype, kv_dtype)
    ops = ops or ops_for(dtype)
    if not config.is_native:
        if adaptable:
            raise InvalidSetting(
                f"LoRA adapters need a native family, and {config.architecture} runs in transformers' code; leave out "
                "--max-loras",
                param="runner.max_adapters",
            )
        # Optional, and slow to import.
        from penstock.models.upstream import UpstreamModel

        return UpstreamModel(path, config, dtype, kv_dtype, ops)
    has_arrays = ahead is not None and ahead.weights is not None
    with nullcontext() if has_arrays else torch.inference_mode(), open_weights(path, ahead) as weights:
        model = DecoderModel(config, weights, dtype, kv_dtype, ops, max_tokens=max_tokens, adaptable=adaptable)
        ignored = list(weights.unused())
    for name in ignored:
        if plain_name(name).startswith(f"model.layers.{config.num_layers}."):
            raise ModelUnreadable(
                f"{path} has tensors of a layer {config.num_layers} ({name}), and its config says that there are "
                f"{config.num_layers} layers; the two do not belong together"
            )
    num_scales = sum(name.endswith(_CACHE_SCALES) for name in ignored)
    if num_scales:
        _log.info("cache_scales_ignored", num_tensors=num_scales, kv_dtype=kv_dtype)
    if ignored:
        _log.debug("weights_ignored", num_tensors=len(ignored), first=ignored[0])
    return model


def count_parameters(path: Path, config: ModelConfig, ahead: Ahead | None = None) -> dict[Scheme | None, int]:
    """Return how many parameters ``load_model`` will hold, by how they are quantized, from the files' headers alone.

    Those of a vision encoder are ``count_vision_parameters``'. The embedding is a table of floats, or the tied head.
    """
    counts: Counter[Scheme | None] = Counter()
    with open_weights(path, ahead) as weights:
        for name, num_parameters, scheme in weights.sizes():
            is_tied = config.tie_word_embeddings
            if is_of_seeing(name):
                continue
            if name in _EMBEDDING_NAMES and not is_tied:
                counts[None] += num_parameters
            elif name != "lm_head.weight" or not is_tied:
                counts[scheme] += num_parameters
    return counts


def run_dtype(config: ModelConfig, dtype: str) -> str:
    """Return the dtype of a model's weights: the one asked for, or for ``auto`` the checkpoint's own if
    kernels take it beside float32 activations, and float32, which holds every value of the others exactly, if not.
    """
    dtype = _SHORT_NAMES.get(dtype, dtype)
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InvalidSetting(f"dtype is {dtype!r}; it can be auto, {', '.join(DTYPES)}", param="dtype")
        return dtype
    return config.dtype if ops_for(config.dtype).activation_dtype(config.dtype) == "float32" else "float32"


def cache_dtype(weights_dtype: str, kv_dtype: str) -> str:
    """Return the dtype of cached keys and values: the one asked for, or for ``auto`` the weights'."""
    kv_dtype = _SHORT_NAMES.get(kv_dtype, kv_dtype)
    if kv_dtype == "auto":
        return weights_dtype
    if kv_dtype not in KV_DTYPES:
        raise InvalidSetting(
            f"kv_dtype is {kv_dtype!r}; it can be auto, {', '.join(KV_DTYPES)}", param="runner.kv_dtype"
        )
    return kv_dtype
