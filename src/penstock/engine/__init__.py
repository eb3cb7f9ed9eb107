"""The engine: continuous batching of token generation over one model, in this process or in its own."""

from penstock.engine.config import CacheConfig, EngineConfig, RunnerConfig, SchedulerConfig
from penstock.engine.metrics import EngineMetrics
from penstock.engine.process import ProcessClient

__all__ = [
    "CacheConfig",
    "EngineConfig",
    "EngineMetrics",
    "ProcessClient",
    "RunnerConfig",
    "SchedulerConfig",
]
