"""What reads images for a model; apart from its text, which the engine's process reads too."""

from penstock.images.config import ImageConfig
from penstock.images.families import load_processor
from penstock.images.reader import ImageReader
from penstock.launch.settings import ModelSettings
from penstock.launch.text import directory_of
from penstock.models import find_shape


def load_images(model: ModelSettings, config: ImageConfig) -> ImageReader | None:
    """Return what reads images for ``model``; None if it sees none, as a shape does. Raises ``ModelUnreadable``."""
    processor = None if find_shape(model.name) else load_processor(directory_of(model), config)
    return None if processor is None else ImageReader(processor, config)
