"""From settings to a loaded engine. What would not fit is found out before anything is loaded."""

import ctypes
from collections.abc import Mapping
from pathlib import Path

from penstock.errors import InvalidSetting, MissingExtra
from penstock.estimate.memory import ModelShape, plan_memory
from penstock.estimate.system import available_memory_bytes, usable_cores
from penstock.launch.settings import ModelSettings, Settings
from penstock.launch.text import load_tokenizer
from penstock.models import find_shape, read_config, read_pooling, read_sampling_defaults, resolve_model
from penstock.protocol import ModelInfo, SamplingDefaults
from penstock.text import Tokenizer
from penstock.threads import WorkThread

try:
    import torch

    from penstock.engine.assemble import assemble_engine
    from penstock.engine.config import EngineConfig, RunnerConfig
    from penstock.engine.engine import Engine
    from penstock.engine.profile import Profiler
    from penstock.kernels import QUANTIZATIONS, Ops, ReferenceOps, ops_for, use_threads
    from penstock.kernels.paged_attention import cpu as cpu_attention
    from penstock.kernels.paged_attention import reference as reference_attention
    from penstock.kernels.sampling import scratch_bytes
    from penstock.models.config import ModelConfig
    from penstock.models.decoder import cache_dtype, count_parameters, load_model, run_dtype
    from penstock.models.model import LanguageModel
    from penstock.models.random_weights import count_random_parameters, make_random_model
    from penstock.quant import Scheme, bytes_of_weight
except ImportError as error:
    raise MissingExtra(
        f"running a model needs torch ({error}); install it with: pip install 'penstock[engine]'"
    ) from error


_KEPT_BYTES = 1 << 30
"""No tensor of a step is larger."""


def build_engine(settings: Settings, profiler: Profiler | None = None) -> Engine:
    """Resolve, plan, load and assemble; the model's ops and the runner watched by ``profiler``.

    Raises ``ModelUnreadable``, ``NotEnoughMemory`` or ``InvalidSetting``, each before memory was taken for nothing.
    """
    # All cores but one, which the API's process needs.
    num_threads = settings.runner.threads or max(1, usable_cores() - 1)
    use_threads(num_threads)
    config, path = find_model(settings.model)
    sampling = SamplingDefaults() if path is None else read_sampling_defaults(path)
    pooling = settings.runner.pooling or (None if path is None else read_pooling(path)) or "mean"
    # While weights are read and packed, which leaves the interpreter free.
    tokenizer = WorkThread("tokenizer").submit(_detokenizing, settings.model)
    dtype = run_dtype(config, settings.runner.dtype)
    max_model_tokens = settings.runner.max_model_tokens or config.max_positions
    if max_model_tokens > config.max_positions:
        raise InvalidSetting(
            f"requests may have {max_model_tokens} tokens (max_model_tokens), and {settings.model.name} was made for "
            f"{config.max_positions}; lower it",
            param="runner.max_model_tokens",
        )
    num_parameters: Mapping[Scheme | None, int] = (
        {None: count_random_parameters(config)} if path is None else count_parameters(path, config)
    )
    weights_dtype = getattr(torch, dtype)
    kv_dtype = cache_dtype(weights_dtype, settings.runner.kv_dtype)
    ops = ops_for(weights_dtype, settings.runner.quantize)
    plan = plan_memory(
        ModelShape(
            weights_bytes=_weights_bytes(config, num_parameters, weights_dtype, settings.runner.quantize, ops),
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            activation_element_bytes=ops.activation_dtype(weights_dtype).itemsize,
            kv_element_bytes=kv_dtype.itemsize,
            attention_scratch_bytes=_attention_scratch_bytes(
                ops, config, weights_dtype, settings.scheduler.step_tokens, max_model_tokens, num_threads
            ),
            sampling_scratch_bytes=scratch_bytes(config.vocab_size, num_threads),
            kv_scale_bytes=torch.float32.itemsize if kv_dtype is torch.int8 else 0,
        ),
        block_size=settings.cache.block_size,
        step_tokens=settings.scheduler.step_tokens,
        max_running=settings.scheduler.max_running,
        max_model_tokens=max_model_tokens,
        available_bytes=available_memory_bytes(),
        memory_bytes=settings.cache.memory_bytes,
        memory_share=settings.cache.memory_share,
    )
    if profiler is not None:
        form = QUANTIZATIONS[settings.runner.quantize] if settings.runner.quantize else None
        ops = profiler.around_ops(ops, config, quantization=form)
    model = _load(settings.runner, config, path, ops, max_model_tokens)
    _keep_freed_memory()
    info = ModelInfo(
        name=settings.model.name,
        source="random weights" if path is None else str(path),
        architecture=config.architecture,
        dtype=settings.runner.quantize or dtype,
        kv_dtype=str(kv_dtype).removeprefix("torch."),
        num_parameters=model.num_parameters,
        vocab_size=config.vocab_size,
        max_model_tokens=max_model_tokens,
        eos_token_ids=config.eos_token_ids,
        memory=plan,
        sampling=sampling,
        hidden_size=config.hidden_size,
        pooling=pooling,
        kernels=ops.name,
    )
    engine_config = EngineConfig(scheduler=settings.scheduler, cache=settings.cache, runner=settings.runner)
    return assemble_engine(model, tokenizer.result(), engine_config, info=info, profiler=profiler)


def _detokenizing(model: ModelSettings) -> Tokenizer:
    """Return a tokenizer with its tables made, for which the first answer would have to wait."""
    tokenizer = load_tokenizer(model)
    tokenizer.detokenizer(skip_special_tokens=True)
    return tokenizer


def load_bare_model(settings: Settings) -> LanguageModel:
    """Return the model alone, as ``build_engine`` would run it. Raises ``ModelUnreadable`` or ``InvalidSetting``."""
    use_threads(settings.runner.threads or max(1, usable_cores() - 1))
    config, path = find_model(settings.model)
    ops = ops_for(getattr(torch, run_dtype(config, settings.runner.dtype)), settings.runner.quantize)
    return _load(settings.runner, config, path, ops, settings.runner.max_model_tokens or config.max_positions)


def _load(runner: RunnerConfig, config: ModelConfig, path: Path | None, ops: Ops, max_tokens: int) -> LanguageModel:
    adaptable = runner.max_adapters > 0
    if path is None:
        dtype = getattr(torch, run_dtype(config, runner.dtype))
        return make_random_model(config, dtype, cache_dtype(dtype, runner.kv_dtype), ops, adaptable=adaptable)
    return load_model(
        path, dtype=runner.dtype, kv_dtype=runner.kv_dtype, ops=ops, max_tokens=max_tokens, adaptable=adaptable
    )


def _keep_freed_memory() -> None:
    """Have glibc give back what loading took, and from now on keep what a step frees for the next.

    By itself it returns every tensor above 32 MiB to the system at once, which hands out zeroed pages for it again: the
    logits of 64 rows of a large vocabulary cost 10,000 page faults a step. What it keeps is at most one step's
    activations, which the memory plan has counted. Elsewhere than with glibc nothing is done.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return
    libc.malloc_trim(0)
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


def _attention_scratch_bytes(
    ops: Ops, config: ModelConfig, dtype: torch.dtype, step_tokens: int, max_model_tokens: int, num_threads: int
) -> int:
    if isinstance(ops, ReferenceOps):
        return reference_attention.scratch_bytes(
            step_tokens=step_tokens,
            max_model_tokens=max_model_tokens,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            element_bytes=ops.activation_dtype(dtype).itemsize,
        )
    return cpu_attention.scratch_bytes(
        max_model_tokens=max_model_tokens,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_threads=num_threads,
    )


def _weights_bytes(
    config: ModelConfig,
    num_parameters: Mapping[Scheme | None, int],
    dtype: torch.dtype,
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
        widened = 0 if config.is_native else embedding * (4 - dtype.itemsize)
        return int(coded_bytes) + num_floats * dtype.itemsize + widened
    num_rounded = num_floats - (0 if config.tie_word_embeddings else embedding)
    rounded_bytes = num_rounded * QUANTIZATIONS[quantize].weight_bytes
    return int(coded_bytes + rounded_bytes) + embedding * dtype.itemsize
