"""Models: reading a checkpoint, and the families that run natively."""

from penstock.models.config import ModelConfig
from penstock.models.families import read_config
from penstock.models.generation import read_sampling_defaults
from penstock.models.pooling import read_pooling
from penstock.models.shapes import SHAPE_PREFIX, SHAPES, find_shape
from penstock.models.source import DEMO_MODEL, resolve_model

__all__ = [
    "DEMO_MODEL",
    "SHAPES",
    "SHAPE_PREFIX",
    "ModelConfig",
    "find_shape",
    "read_config",
    "read_pooling",
    "read_sampling_defaults",
    "resolve_model",
]
