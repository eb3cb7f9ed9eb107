"""Models: reading a checkpoint, and the families that run natively."""

from penstock.models.config import ModelConfig, RopeScaling, kv_bytes_per_token, read_config
from penstock.models.generation import read_sampling_defaults
from penstock.models.source import DEMO_MODEL, resolve_model

__all__ = [
    "DEMO_MODEL",
    "ModelConfig",
    "RopeScaling",
    "kv_bytes_per_token",
    "read_config",
    "read_sampling_defaults",
    "resolve_model",
]
