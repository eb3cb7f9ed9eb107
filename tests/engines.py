"""Engines over tiny checkpoints, built by hand so that a test can choose every size."""

from pathlib import Path
from typing import Literal

from penstock.engine.assemble import assemble_engine
from penstock.engine.config import CacheConfig, EngineConfig, RunnerConfig, SchedulerConfig, SpeculationConfig
from penstock.engine.encoding.source import FeatureSource
from penstock.engine.engine import Engine
from penstock.engine.profiling import Profiler
from penstock.engine.runner.encoder import LocalEncoder
from penstock.kernels import Ops, ops_for
from penstock.models import read_config
from penstock.models.decoder import load_model
from penstock.models.vision.load import load_vision
from penstock.protocol import GenerateRequest, MemoryPlan, ModelInfo, SamplingParams, TokenDelta
from penstock.text import Tokenizer


def build_engine(
    path: Path,
    *,
    num_blocks: int = 256,
    block_size: int = 4,
    step_tokens: int = 512,
    max_running: int = 64,
    prefix_caching: bool = True,
    dtype: str = "float32",
    kv_dtype: str = "float32",
    ops: Ops | None = None,
    profiler: Profiler | None = None,
    max_adapters: int = 0,
    speculate: Literal["off", "ngram", "suffix", "draft"] = "off",
    encoder_patches: int = 256,
    encoder_cache_bytes: int = 1 << 20,
    source: FeatureSource | None = None,
) -> Engine:
    """Return an engine that serves the checkpoint in ``path`` in ``dtype``, its parts watched by ``profiler``.

    If it sees, it encodes images itself, or has ``source`` do it.
    """
    if source is None:
        encoder = load_vision(path, dtype)
        source = None if encoder is None else LocalEncoder(encoder, step_patches=encoder_patches)
    if profiler is not None:
        ops = profiler.around_ops(ops or ops_for("float32"), read_config(path))
    model = load_model(path, dtype=dtype, kv_dtype=kv_dtype, ops=ops, adaptable=max_adapters > 0)
    config = EngineConfig(
        runner=RunnerConfig(max_adapters=max_adapters),
        scheduler=SchedulerConfig(step_tokens=step_tokens, max_running=max_running),
        cache=CacheConfig(block_size=block_size, prefix_caching=prefix_caching),
        speculation=SpeculationConfig(method=speculate),
    )
    info = ModelInfo(
        name="tiny",
        source=str(path),
        architecture=model.config.architecture,
        dtype=dtype,
        kv_dtype=kv_dtype,
        num_parameters=model.num_parameters,
        vocab_size=model.config.vocab_size,
        max_model_tokens=min(model.config.max_positions, num_blocks * block_size),
        eos_token_ids=model.config.eos_token_ids,
        hidden_size=model.config.hidden_size,
        memory=MemoryPlan(
            weights_bytes=model.weights_bytes,
            activation_peak_bytes=0,
            block_bytes=1,
            num_blocks=num_blocks,
            block_size=block_size,
            available_bytes=0,
            encoder_cache_bytes=encoder_cache_bytes,
        ),
    )
    return assemble_engine(model, Tokenizer.load(path), config, info=info, profiler=profiler, source=source)


def greedy(request_id: str, prompt: list[int], max_tokens: int, **sampling: object) -> GenerateRequest:
    """Return a greedy request that ignores end of sequence unless told otherwise."""
    params = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
    )


def run_to_end(engine: Engine, requests: list[GenerateRequest] | None = None) -> dict[str, list[TokenDelta]]:
    """Add ``requests`` and step until nothing is left; return each request's deltas in order."""
    deltas: dict[str, list[TokenDelta]] = {}
    for request in requests or []:
        deltas[request.request_id] = []
        grammar = request.sampling.grammar
        engine.add(request, None if grammar is None else engine.grammars.compile(grammar))
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
    return deltas


def tokens_of(deltas: list[TokenDelta], index: int = 0) -> list[int]:
    """Return the tokens of one choice."""
    return [token_id for delta in deltas if delta.index == index for token_id in delta.token_ids]


def is_whole(engine: Engine) -> bool:
    """Whether every cache block is free again."""
    status = engine.status()
    return status.num_free_blocks == status.num_blocks and not status.num_running and not status.num_waiting
