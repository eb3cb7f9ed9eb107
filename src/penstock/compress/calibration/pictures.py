"""Pictures in calibration texts: read from files, and their features in the place of placeholders' embeddings.

T tokens of a sequence, E hidden width.
"""

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from penstock.errors import CalibrationUnfit, RequestError
from penstock.images.config import ImageConfig
from penstock.images.families import load_processor
from penstock.images.reader import ImageReader
from penstock.images.shown import Shown
from penstock.models import ModelConfig
from penstock.models.config import VisionConfig
from penstock.models.parts import Loader
from penstock.models.vision import RotaryPositions
from penstock.models.vision.encoder import VisionEncoder
from penstock.models.vision.load import make_encoder
from penstock.models.vision.visible import seen_both_ways, visible_tokens
from penstock.protocol import Picture
from penstock.server.pictures import PicturePlaces
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer


class PictureReader:
    """How a model's images become tokens and pictures."""

    def __init__(self, path: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Raises ``CalibrationUnfit`` if the model in directory ``path`` sees nothing."""
        processor = load_processor(path)
        if config.vision is None or processor is None:
            raise CalibrationUnfit("the model sees no images; give texts alone")
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

    def positions(
        self, vision: VisionConfig | None, sequences: Sequence[int], lengths: Sequence[int]
    ) -> npt.NDArray[np.int64] | None:
        """Return where tokens of ``sequences``, of these ``lengths``, are on three axes; None where there is one."""
        if vision is None or not vision.has_three_axes:
            return None
        parts = [RotaryPositions(self._pictures[i]).of(0, n) for i, n in zip(sequences, lengths, strict=True)]
        return np.concatenate(parts, axis=1)

    def visible(
        self, vision: VisionConfig | None, sequences: Sequence[int], lengths: Sequence[int]
    ) -> npt.NDArray[np.int32] | None:
        """Return how many of its sequence's tokens each one sees; None where that is those before it.

        Of a prompt that is read whole, what comes behind its last picture is taken as the answer: one after another.
        """
        extents = [
            seen_both_ways(vision, pictures, pictures[-1].offset + pictures[-1].num_tokens if pictures else 0)
            for pictures in (self._pictures[i] for i in sequences)
        ]
        if not any(extents):
            return None
        return np.concatenate([visible_tokens(own, 0, n) for own, n in zip(extents, lengths, strict=True)])


def text_follows(token_ids: Tensor, vision: VisionConfig | None) -> Tensor:
    """Return which of a sequence's tokens [T], but for the last, have text behind them, [T - 1].

    That more of a picture follows is no text that a model could know.
    """
    return token_ids[1:] != (-1 if vision is None else vision.image_token_id)
