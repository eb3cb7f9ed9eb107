"""From settings to an engine that takes requests."""

import os

import torch

from penstock.engine.assemble import assemble_engine
from penstock.engine.engine import Engine
from penstock.errors import InvalidSetting
from penstock.estimate import ModelShape, available_memory_bytes, plan_memory
from penstock.launch.settings import Settings
from penstock.models import ModelConfig, read_config, resolve_model
from penstock.models.decoder import load_model, run_dtype
from penstock.models.weights import weight_files
from penstock.protocol import MemoryPlan, ModelInfo
from penstock.text import Tokenizer


def build_engine(settings: Settings) -> Engine:
    """Return the engine ``settings`` describe; nothing large is read before the memory plan says that it fits.

    Sets torch's threads for the whole process. Raises ``ConfigError``.
    """
    torch.set_num_threads(settings.runner.threads or len(os.sched_getaffinity(0)))
    path = resolve_model(settings.model.name, settings.model.revision)
    config = read_config(path)
    tokenizer = Tokenizer.load(path)
    dtype = run_dtype(config, settings.runner.dtype)
    max_model_tokens = _max_model_tokens(config, settings)
    file_bytes = sum(file.stat().st_size for file in weight_files(path))
    plan = _plan(config, settings, file_bytes, dtype, max_model_tokens)
    model = load_model(path, dtype=dtype)
    info = ModelInfo(
        name=settings.model.name,
        source=str(path),
        architecture=config.architecture,
        dtype=dtype,
        num_parameters=model.num_parameters,
        vocab_size=config.vocab_size,
        max_model_tokens=max_model_tokens,
        eos_token_ids=config.eos_token_ids,
        memory=plan,
    )
    return assemble_engine(model, tokenizer, settings.engine, info=info)


def _max_model_tokens(config: ModelConfig, settings: Settings) -> int:
    asked = settings.runner.max_model_tokens
    if asked is None:
        return config.max_positions
    if not 1 <= asked <= config.max_positions:
        raise InvalidSetting(
            f"runner.max_model_tokens is {asked}; this model takes 1 to {config.max_positions}",
            param="runner.max_model_tokens",
        )
    return asked


def _plan(config: ModelConfig, settings: Settings, file_bytes: int, dtype: str, max_model_tokens: int) -> MemoryPlan:
    element_bytes = _element_bytes(dtype)
    shape = ModelShape(
        weights_bytes=file_bytes * element_bytes // _element_bytes(config.dtype),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        element_bytes=element_bytes,
    )
    return plan_memory(
        shape,
        block_size=settings.cache.block_size,
        step_tokens=settings.scheduler.step_tokens,
        max_running=settings.scheduler.max_running,
        max_model_tokens=max_model_tokens,
        available_bytes=available_memory_bytes(),
        memory_bytes=settings.cache.memory_bytes,
        memory_share=settings.cache.memory_share,
    )


def _element_bytes(dtype: str) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize
