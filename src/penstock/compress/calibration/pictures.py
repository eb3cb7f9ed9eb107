"""Pictures in calibration texts: read from files, and their features in the place of placeholders' embeddings.

T tokens of a sequence, E hidden width.
"""

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from penstock.errors import CalibrationUnfit, RequestError
from penstock.images.config import ImageConfig
from penstock.images.families import load_processor
from penstock.images.reader import ImageReader, Shown
from penstock.models import ModelConfig
from penstock.models.parts import Loader
from penstock.models.vision.encoder import VisionEncoder
from penstock.models.vision.load import make_encoder
from penstock.protocol import Picture
from penstock.server.pictures import PicturePlaces
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer


class PictureReader:
    """How a model's images become tokens and pictures."""

    def __init__(self, path: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Raises ``CalibrationUnfit`` if the model in directory ``path`` sees nothing, or not from left to right."""
        processor = load_processor(path)
        if config.vision is None or processor is None:
            raise CalibrationUnfit("the model sees no images; give texts alone")
        if config.vision.sees_both_ways or config.vision.has_three_axes:
            raise CalibrationUnfit(
                f"{config.architecture} lets a picture's tokens see each other, or counts them on several axes, which "
                "calibration does not do yet; give texts alone"
            )
        self._reader = ImageReader(processor, ImageConfig())
        self._most_tokens = config.max_positions
        self._places = PicturePlaces(processor, tokenizer)

    def paired(self, text: str, num_images: int) -> str:
        """Return ``text`` with the markers of images before it."""
        return "".join([f"{self._places.image_marker}\n"] * num_images) + self._places.neutral(text)

    def rendered(self, template: ChatTemplate, messages: Any) -> str:
        """Return a chat in which images are parts of messages."""
        fitted = []
        for message in self._places.neutral(messages):
            content = message["content"]
            if not isinstance(content, str) and not template.takes_parts:
                content = "".join(part.get("text") or self._places.image_marker for part in content)
            fitted.append({**message, "content": content})
        return template.render(fitted, add_generation_prompt=False)

    def tokens(self, text: str, images: Sequence[Path], where: str) -> tuple[list[int], tuple[Picture, ...]]:
        """Return tokens and pictures of a text in which ``images`` have markers. Raises ``CalibrationUnfit``."""
        try:
            data = [base64.b64encode(image.read_bytes()).decode() for image in images]
            shown = [Shown(place=str(file), url=f"data:;base64,{one}") for file, one in zip(images, data, strict=True)]
            seen = asyncio.run(self._reader.read(shown, self._most_tokens))
            return self._places.tokens(text, seen, add_special_tokens=True)
        except OSError as error:
            raise CalibrationUnfit(f"{where}: {error.filename} cannot be read ({error.strerror})") from error
        except RequestError as error:
            raise CalibrationUnfit(f"{where}: {error.message}") from error


class Pictures:
    """The pictures of all sequences; what sees them is loaded when it is needed."""

    def __init__(self, path: Path, pictures: Sequence[Sequence[Picture]]) -> None:
        """``pictures`` of each sequence in order, as the model in directory ``path`` wants them."""
        self._path = path
        self._pictures = pictures

    def load(self, loader: Loader) -> VisionEncoder | None:
        """Return what encodes them; None if there are none."""
        return make_encoder(self._path, loader) if any(self._pictures) else None

    def insert(self, encoder: VisionEncoder, sequence: int, x: Tensor) -> None:
        """Put features over a sequence's embeddings ``x`` [T, E], where its placeholders are."""
        pictures = self._pictures[sequence]
        for picture, features in zip(pictures, encoder.encode(pictures), strict=True):
            x[picture.offset : picture.offset + picture.num_tokens] = features
