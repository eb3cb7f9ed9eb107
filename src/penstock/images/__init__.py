"""Images on their way to a vision encoder: bytes become pixels, and pixels what a family's encoder reads."""

from penstock.images.families import load_processor
from penstock.images.processor import Expansion, Prepared, Processor

__all__ = ["Expansion", "Prepared", "Processor", "load_processor"]
