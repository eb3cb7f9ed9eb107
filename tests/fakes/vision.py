"""A family that sees in a simple way: it says in tokens how large an image is."""

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image
from tokenizers import AddedToken

from penstock.images.processor import Expansion, Prepared
from penstock.images.shown import Detail
from penstock.text import Tokenizer
from tests.fakes.tokenizer_files import byte_level_tokenizer

LIST_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'video' %}<video>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class FakeProcessor:
    """A ``Processor``: 16x16 pixels and 4 tokens for an image, and as many again for a closer look."""

    image_marker = "<image>"
    video_marker: str | None = "<video>"
    placeholder = "<image>"
    video_placeholder: str | None = "<frame>"
    most_pixels = 16 * 16
    most_tiles = 1

    def __init__(self) -> None:
        self.seen: list[Image] = []

    def image(self, image: Image, detail: Detail) -> Expansion:
        """Return the image, and where it is to be looked at closely its middle as well."""
        self.seen.append(image)
        pictures = [_prepared([image], image, 4)]
        if detail == "high":
            width, height = image.size
            pictures.append(_prepared([image.crop((0, 0, width // 2, height // 2))], image, 3))
        runs = "|".join(self.placeholder * picture.num_tokens for picture in pictures)
        return Expansion(text=f"[{runs}]", pictures=tuple(pictures))

    def video(self, frames: Sequence[Image], frames_per_s: float) -> Expansion:
        """Return the frames, two tokens each."""
        self.seen.extend(frames)
        picture = _prepared(frames, frames[0], 2 * len(frames))
        return Expansion(text=f"({'<frame>' * picture.num_tokens})", pictures=(picture,))


def _prepared(frames: Sequence[Image], whole: Image, num_tokens: int) -> Prepared:
    pixels = np.stack([np.asarray(frame.resize((16, 16))) for frame in frames])
    return Prepared(pixels=pixels, num_tokens=num_tokens, size=(whole.height, whole.width))


def seeing_tokenizer() -> Tokenizer:
    """Return a tokenizer with the fake family's placeholders."""
    backend = byte_level_tokenizer()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<image>", "<frame>")])
    return Tokenizer.of(backend)
