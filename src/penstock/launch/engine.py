"""From settings to a loaded engine. What would not fit is found out before anything is loaded."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from penstock.errors import InvalidSetting, MissingExtra
from penstock.estimate.memory import ModelShape, plan_memory
from penstock.estimate.seeing import encoding_peak_bytes
from penstock.estimate.system import available_memory_bytes
from penstock.images.config import DECODED_PIXEL_BYTES
from penstock.kernels.dtypes import ELEMENT_BYTES
from penstock.launch import encoder
from penstock.launch.ahead import Begun
from penstock.launch.settings import ModelSettings, Settings
from penstock.launch.text import load_tokenizer
from penstock.launch.threads import share_threads, tied_cpus
from penstock.lean_torch import load_torch
from penstock.models import find_shape, read_config, read_pooling, read_sampling_defaults, resolve_model
from penstock.protocol import ModelInfo, SamplingDefaults
from penstock.resident import give_back
from penstock.text import Tokenizer
from penstock.threads import WorkThread


def _missing_torch(error: Exception) -> MissingExtra:
    return MissingExtra(f"running a model needs torch ({error}); install it with: pip install 'penstock[engine]'")


try:
    import torch  # noqa: F401 - whoever lacks it is told so

    from penstock.engine.assemble import assemble_engine
    from penstock.engine.config import EngineConfig, RunnerConfig
    from penstock.engine.encoding.source import FeatureSource
    from penstock.engine.engine import Engine
    from penstock.kernels import QUANTIZATIONS, CPUOps, Ops, ops_for, use_threads
    from penstock.kernels.paged_attention import cpu as cpu_attention
    from penstock.kernels.sampling import scratch_bytes
    from penstock.models.ahead import Ahead
    from penstock.models.config import ModelConfig
    from penstock.models.decoder import cache_dtype, count_parameters, load_model, run_dtype
    from penstock.models.model import LanguageModel
    from penstock.models.random_weights import count_random_parameters, make_random_model
    from penstock.quant import Scheme, bytes_of_weight
except ImportError as error:
    raise _missing_torch(error) from error


if TYPE_CHECKING:
    from penstock.engine.profiling import Profiler
    from penstock.models.vision import VisionEncoder

_KEPT_BYTES = 1 << 30
"""No tensor of a step is larger."""


def build_engine(settings: Settings, profiler: "Profiler | None" = None, *, ahead: Begun | None = None) -> Engine:
    """Resolve, plan, load and assemble; the model's ops and the runner watched by ``profiler``.

    ``ahead`` is what was begun of the same settings before. What only a model that sees takes is imported for one.

    Raises ``ModelUnreadable``, ``NotEnoughMemory``, ``InvalidSetting`` or ``MissingExtra``, each before memory was
    taken for nothing.
    """
    if ahead is not None and ahead.needs_torch:
        try:
            load_torch()
        except (ImportError, OSError) as error:  # the latter where a library of its own is not there
            raise _missing_torch(error) from error
    weights = None if ahead is None else ahead.weights
    target = _choose(settings.model, settings, weights)
    _use_threads(settings, target.precision)
    # From where the model was found: a hub would be asked again.
    found = settings.model if target.path is None else ModelSettings(name=str(target.path))
    tokenizer = (None if ahead is None else ahead.tokenizer) or load_tokenizer(found, is_late=True)
    config, ops = target.config, target.ops
    if weights is not None and isinstance(ops, CPUOps):
        ops = replace(ops, ahead=weights.packed)
    drafting = _choose_draft(settings, target, tokenizer)
    sampling = SamplingDefaults() if target.path is None else read_sampling_defaults(target.path)
    pooling = settings.runner.pooling or (None if target.path is None else read_pooling(target.path)) or "mean"
    max_model_tokens = settings.runner.max_model_tokens or config.max_positions
    if max_model_tokens > config.max_positions:
        raise InvalidSetting(
            f"requests may have {max_model_tokens} tokens (max_model_tokens), and {settings.model.name} was made for "
            f"{config.max_positions}; lower it",
            param="runner.max_model_tokens",
        )
    plan = plan_memory(
        target.shape if drafting is None else replace(target.shape, draft=drafting.shape),
        block_size=settings.cache.block_size,
        step_tokens=settings.scheduler.step_tokens,
        max_running=settings.scheduler.max_running,
        max_model_tokens=max_model_tokens,
        available_bytes=available_memory_bytes() if ahead is None else ahead.available_bytes,
        memory_bytes=settings.cache.memory_bytes,
        memory_share=settings.cache.memory_share,
    )
    if profiler is not None:
        form = QUANTIZATIONS[settings.runner.quantize] if settings.runner.quantize else None
        ops = profiler.around_ops(ops, config, quantization=form)
    adaptable = settings.runner.max_adapters > 0
    model = _load(
        target,
        settings.runner,
        ops,
        max_tokens=max_model_tokens,
        adaptable=adaptable,
        ahead=weights,
    )
    draft = None
    if drafting is not None:
        longest = min(max_model_tokens, drafting.config.max_positions)
        draft = _load(drafting, settings.runner, drafting.ops, max_tokens=longest, adaptable=False)
    info = ModelInfo(
        name=settings.model.name,
        source="random weights" if target.path is None else str(target.path),
        architecture=config.architecture,
        dtype=target.precision,
        kv_dtype=target.kv_dtype,
        num_parameters=model.num_parameters + _num_seeing(target),
        vocab_size=config.vocab_size,
        max_model_tokens=max_model_tokens,
        eos_token_ids=config.eos_token_ids,
        memory=plan,
        sampling=sampling,
        hidden_size=config.hidden_size,
        pooling=pooling,
        kernels=ops.name,
        sees=config.vision is not None,
    )
    source = _open_source(settings, target)
    engine_config = EngineConfig(
        scheduler=settings.scheduler, cache=settings.cache, runner=settings.runner, speculation=settings.speculation
    )
    engine = assemble_engine(model, tokenizer, engine_config, info=info, profiler=profiler, draft=draft, source=source)
    give_back()
    _keep_freed_memory()
    if ahead is None or ahead.tokenizer is None:
        # It holds the interpreter, which is idle from here until somebody has heard of the engine and asks something.
        WorkThread("vocabulary").submit(tokenizer.detokenizer, skip_special_tokens=True)
    return engine


def _num_seeing(target: "_Chosen") -> int:
    """Return how many parameters a model has for seeing, wherever they run."""
    if target.path is None or target.config.vision is None:
        return 0
    from penstock.models.vision.load import count_vision_parameters

    return count_vision_parameters(target.path)


def _open_source(settings: Settings, target: "_Chosen") -> FeatureSource | None:
    """Return what encodes images for a model; None if it sees none. Raises ``ConfigError``."""
    num_workers = settings.runner.encoder_workers
    if target.config.vision is None:
        if num_workers:
            raise InvalidSetting(
                f"{num_workers} processes are to encode images (--encoder-workers), and {settings.model.name} sees "
                "none; leave them out",
                param="runner.encoder_workers",
            )
        return None
    if not num_workers:
        from penstock.engine.runner.encoder import LocalEncoder

        return LocalEncoder(load_encoder(settings), step_patches=settings.scheduler.encoder_patches)
    assert target.path is not None, "no shape of a published model sees"
    from penstock.engine.encoding.pool import EncoderPool
    from penstock.models.vision.load import read_tower_shape

    pool = EncoderPool(
        encoder.command(),
        msgspec.json.encode(settings),
        num_workers=num_workers,
        step_bytes=settings.scheduler.encoder_patches * read_tower_shape(target.path).patch_bytes,
        timeout_s=settings.runner.encoder_timeout_s,
    )
    pool.start()
    return pool


def load_encoder(settings: Settings) -> "VisionEncoder":
    """Return what the model sees with. Raises ``ModelUnreadable``."""
    from penstock.models.vision.load import load_vision

    config, path = find_model(settings.model)
    assert path is not None, "no shape of a published model sees"
    found = load_vision(path, run_dtype(config, settings.runner.dtype))
    assert found is not None, "it was asked of a model that sees"
    return found


def load_bare_model(settings: Settings) -> LanguageModel:
    """Return the model alone, as ``build_engine`` would run it. Raises ``ModelUnreadable`` or ``InvalidSetting``."""
    chosen = _choose(settings.model, settings)
    _use_threads(settings, chosen.precision)
    adaptable = settings.runner.max_adapters > 0
    return _load(chosen, settings.runner, chosen.ops, max_tokens=chosen.max_tokens, adaptable=adaptable)


def _use_threads(settings: Settings, precision: str) -> None:
    threads = share_threads(settings)
    # Widening bfloat16 from the 12 bits it is kept in takes one row as long as reading it.
    few_rows = threads.many_rows if precision == "bfloat16" else threads.few_rows
    use_threads(few_rows, many_rows_threads=threads.many_rows, cpus=tied_cpus(settings, threads.many_rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """A model before it is loaded."""

    config: ModelConfig
    path: Path | None
    """None for random weights"""
    dtype: str
    precision: str
    """What weights are kept in: a dtype, a quantization, or what most of a checkpoint's codes are, such as w4a16"""
    kv_dtype: str
    max_tokens: int
    """Of the longest sequence"""
    ops: Ops
    shape: ModelShape


def _choose(model: ModelSettings, settings: Settings, ahead: Ahead | None = None) -> _Chosen:
    """Return what ``model`` will run as. Raises ``ModelUnreadable`` or ``InvalidSetting``."""
    runner, num_threads = settings.runner, share_threads(settings).many_rows
    config, path = find_model(model)
    num_parameters: Mapping[Scheme | None, int] = (
        {None: count_random_parameters(config)} if path is None else count_parameters(path, config, ahead)
    )
    dtype = run_dtype(config, runner.dtype)
    kv_dtype = cache_dtype(dtype, runner.kv_dtype)
    max_tokens = min(runner.max_model_tokens or config.max_positions, config.max_positions)
    ops = ops_for(dtype, runner.quantize)
    shape = ModelShape(
        weights_bytes=_weights_bytes(config, num_parameters, dtype, runner.quantize, ops),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_width,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        activation_element_bytes=ELEMENT_BYTES[ops.activation_dtype(dtype)],
        kv_element_bytes=ELEMENT_BYTES[kv_dtype],
        attention_scratch_bytes=_attention_scratch_bytes(
            ops, (config.num_heads, config.num_kv_heads, config.head_dim), max_tokens, num_threads
        ),
        sampling_scratch_bytes=scratch_bytes(config.vocab_size, num_threads),
        kv_scale_bytes=ELEMENT_BYTES["float32"] if kv_dtype == "int8" else 0,
    )
    if path is not None and config.vision is not None:
        shape = _with_seeing(shape, settings, path, dtype)
    return _Chosen(
        config=config,
        path=path,
        dtype=dtype,
        precision=runner.quantize or _precision(num_parameters, dtype),
        kv_dtype=kv_dtype,
        max_tokens=max_tokens,
        ops=ops,
        shape=shape,
    )


def _precision(num_parameters: Mapping[Scheme | None, int], dtype: str) -> str:
    coded = {scheme: number for scheme, number in num_parameters.items() if scheme is not None}
    if not coded:
        return dtype
    scheme = max(coded, key=coded.__getitem__)
    return f"w{scheme.bits}a{16 if scheme.activations is None else 8}"


def _choose_draft(settings: Settings, target: _Chosen, tokenizer: Tokenizer) -> _Chosen | None:
    """Return the model that guesses, if one does. Raises ``InvalidSetting`` for one of another vocabulary."""
    name, method = settings.speculation.model, settings.speculation.method
    if (name is None) == (method == "draft"):
        raise InvalidSetting(
            "speculation by a draft model takes both a method and a model: --speculate draft --speculative-model MODEL"
            if name is None
            else f"a draft model is given ({name}) and the method is {method}; say --speculate draft as well",
            param="speculation.model",
        )
    if name is None:
        return None
    draft = _choose(ModelSettings(name=name), settings)
    other = load_tokenizer(ModelSettings(name=name), is_late=True)
    num_ids = target.config.vocab_size
    if draft.config.vocab_size != num_ids or not tokenizer.has_tokens_of(other, num_ids=num_ids):
        raise InvalidSetting(
            f"{name} has another vocabulary than {settings.model.name}, for which it is to guess; take a smaller model "
            "of the same family",
            param="speculation.model",
        )
    return draft


def _load(
    chosen: _Chosen,
    runner: RunnerConfig,
    ops: Ops,
    *,
    max_tokens: int,
    adaptable: bool,
    ahead: Ahead | None = None,
) -> LanguageModel:
    if chosen.path is None:
        return make_random_model(chosen.config, chosen.dtype, chosen.kv_dtype, ops, adaptable=adaptable)
    return load_model(
        chosen.path,
        dtype=runner.dtype,
        kv_dtype=runner.kv_dtype,
        ops=ops,
        max_tokens=max_tokens,
        adaptable=adaptable,
        ahead=ahead,
    )


def _keep_freed_memory() -> None:
    """Have glibc keep, from now on, what a step frees for the next.

    By itself it returns every tensor above 32 MiB to the system at once, which hands out zeroed pages for it again: the
    logits of 64 rows of a large vocabulary cost 10,000 page faults a step. What it keeps is at most one step's
    activations, which the memory plan has counted. Elsewhere than with glibc nothing is done.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    # Numbers of malloc.h; a threshold that it finds too high is left as it was.
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, _KEPT_BYTES)
    libc.mallopt(m_trim_threshold, _KEPT_BYTES)


def find_model(model: ModelSettings) -> tuple[ModelConfig, Path | None]:
    """Return a model's configuration and the directory of its weights; None where they are to be random."""
    shape = find_shape(model.name)
    if shape is not None:
        return shape, None
    path = resolve_model(model.name, model.revision)
    return read_config(path), path


def _with_seeing(shape: ModelShape, settings: Settings, path: Path, dtype: str) -> ModelShape:
    """Return ``shape`` with what it takes to see, in all processes. Raises ``ModelUnreadable``."""
    decoded = settings.images.workers * settings.images.max_pixels * DECODED_PIXEL_BYTES
    # In the API's process: in base64 as a body and as text, and as what they became.
    in_api = 2 * settings.server.max_bodies_bytes + settings.images.kept_bytes + settings.scheduler.max_image_bytes
    return replace(
        shape,
        encoder_weights_bytes=_encoder_bytes(path, dtype, settings.runner.encoder_workers),
        encoder_cache_bytes=settings.cache.encoder_memory_bytes,
        encoder_peak_bytes=max(1, settings.runner.encoder_workers) * encoding_bytes(settings, path, dtype),
        image_bytes=decoded + in_api + settings.scheduler.max_image_bytes,
    )


def encoding_bytes(settings: Settings, path: Path, dtype: str) -> int:
    """Return what one process holds at most while it encodes images, beside weights and features.

    For the model in directory ``path``, which sees. Raises ``ModelUnreadable``.
    """
    from penstock.images.families import load_processor
    from penstock.models.vision.attention import ROWS_AT_ONCE
    from penstock.models.vision.load import read_tower_shape

    processor = load_processor(path, settings.images)
    assert processor is not None, "it was asked of a model that sees"
    ops, tower = ops_for(dtype), read_tower_shape(path)
    threads = share_threads(settings)
    return encoding_peak_bytes(
        tower,
        image_bytes=3 * processor.most_pixels,
        num_tiles=processor.most_tiles,
        rows_at_once=ROWS_AT_ONCE,
        element_bytes=ELEMENT_BYTES[ops.activation_dtype(dtype)],
    ) + _attention_scratch_bytes(
        ops,
        (tower.num_heads, tower.num_heads, tower.head_dim),
        processor.most_pixels // tower.patch_size**2 + 1,
        threads.encoder or threads.many_rows,
    )


def _attention_scratch_bytes(ops: Ops, heads: tuple[int, int, int], max_model_tokens: int, num_threads: int) -> int:
    """Return what attention works in; ``heads`` are query heads, KV heads and a head's width."""
    num_heads, num_kv_heads, head_dim = heads
    sizes = {
        "max_model_tokens": max_model_tokens,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }
    if isinstance(ops, CPUOps):
        return cpu_attention.scratch_bytes(**sizes, num_threads=num_threads)
    from penstock.kernels.paged_attention import reference as reference_attention

    return reference_attention.scratch_bytes(**sizes)


def _encoder_bytes(path: Path, dtype: str, num_workers: int) -> int:
    """Return what the weights take that a model sees with, in all processes that have them."""
    from penstock.models.vision.load import count_vision_parameters

    return max(1, num_workers) * count_vision_parameters(path) * ELEMENT_BYTES[dtype]


def _weights_bytes(
    config: ModelConfig,
    num_parameters: Mapping[Scheme | None, int],
    dtype: str,
    quantize: str | None,
    ops: Ops,
) -> int:
    """Return what weights take: the checkpoint's codes as ``ops`` keep them, the embedding in ``dtype``, and the rest
    in it too or in the codes it is rounded to.

    A tied embedding is held twice then, as a table and as the head's codes.
    """
    coded_bytes, num_floats = 0.0, 0
    for scheme, count in num_parameters.items():
        weight_bytes = None if scheme is None else bytes_of_weight(ops, scheme)
        if weight_bytes is None:
            num_floats += count
        else:
            coded_bytes += count * weight_bytes
    embedding = config.vocab_size * config.hidden_size
    if quantize is None:
        # transformers' code computes in float32, its embedding included.
        widened = 0 if config.is_native else embedding * (4 - ELEMENT_BYTES[dtype])
        return int(coded_bytes) + num_floats * ELEMENT_BYTES[dtype] + widened
    num_rounded = num_floats - (0 if config.tie_word_embeddings else embedding)
    rounded_bytes = num_rounded * QUANTIZATIONS[quantize].rounded_weight_bytes
    return int(coded_bytes + rounded_bytes) + embedding * ELEMENT_BYTES[dtype]
