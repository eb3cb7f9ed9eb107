"""The values and interfaces that packages share: what goes into an engine and what comes out of it."""

from penstock.protocol.client import EngineClient
from penstock.protocol.generate import (
    BeamParams,
    Candidate,
    ErrorInfo,
    FinishReason,
    GenerateRequest,
    Picture,
    Pooling,
    Priority,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
    Usage,
)
from penstock.protocol.status import (
    EngineCounters,
    EngineState,
    EngineStatus,
    MemoryPlan,
    ModelInfo,
    SamplingDefaults,
    SeeingStatus,
)
from penstock.protocol.timeline import Preemption, Timeline

__all__ = [
    "BeamParams",
    "Candidate",
    "EngineClient",
    "EngineCounters",
    "EngineState",
    "EngineStatus",
    "ErrorInfo",
    "FinishReason",
    "GenerateRequest",
    "MemoryPlan",
    "ModelInfo",
    "Picture",
    "Pooling",
    "Preemption",
    "Priority",
    "SamplingDefaults",
    "SamplingParams",
    "SeeingStatus",
    "Timeline",
    "TokenDelta",
    "TokenLogprobs",
    "Usage",
]
