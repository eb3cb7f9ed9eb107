"""Vision towers and projectors, one module per family."""

from penstock.models.vision.encoder import Inserted, VisionEncoder

__all__ = ["Inserted", "VisionEncoder"]
