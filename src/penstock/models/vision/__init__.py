"""Vision towers and projectors, one module per family."""

from penstock.models.vision.encoder import Inserted, VisionEncoder
from penstock.models.vision.positions import RotaryPositions

__all__ = ["Inserted", "RotaryPositions", "VisionEncoder"]
