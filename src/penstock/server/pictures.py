"""The places of pictures in a prompt: markers of the chat template become placeholder tokens."""

import re
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

from penstock.errors import InvalidRequest, ModelUnreadable
from penstock.protocol import Picture
from penstock.text import Tokenizer

if TYPE_CHECKING:
    from penstock.images.processor import Processor
    from penstock.images.reader import Seen

T = TypeVar("T")


class PicturePlaces:
    """How a family's images stand in text and tokens. Immutable; used from several threads."""

    def __init__(self, processor: "Processor", tokenizer: Tokenizer) -> None:
        """Raises ``ModelUnreadable`` where a placeholder is no token of ``tokenizer``."""
        self.image_marker = processor.image_marker
        self.video_marker = processor.video_marker
        self._tokenizer = tokenizer
        markers = [marker for marker in (processor.image_marker, processor.video_marker) if marker is not None]
        self._marker = re.compile("|".join(map(re.escape, markers)))
        self._placeholders = (processor.placeholder, processor.video_placeholder)
        """Of images and of videos"""
        placeholders = [one for one in self._placeholders if one is not None]
        self._ids = {_only_id(placeholder, tokenizer) for placeholder in placeholders}
        self._reserved = re.compile("|".join(map(re.escape, sorted({*markers, *placeholders}, key=len, reverse=True))))

    def neutral(self, value: T) -> T:
        """Return what a caller wrote, text or JSON, without what would be taken for an image: ``<image>`` becomes
        ``< image>``, which a model reads as the word that it is.
        """
        if isinstance(value, str):
            return self._reserved.sub(lambda found: f"{found[0][0]} {found[0][1:]}", value)  # type: ignore[return-value]
        if isinstance(value, dict):
            return {self.neutral(key): self.neutral(one) for key, one in value.items()}  # type: ignore[return-value]
        if isinstance(value, list):
            return [self.neutral(one) for one in value]  # type: ignore[return-value]
        return value

    def tokens(
        self, text: str, seen: "Sequence[Seen]", *, add_special_tokens: bool
    ) -> tuple[list[int], tuple[Picture, ...]]:
        """Return the tokens of a rendered conversation, with its images in the places of their markers.

        Raises ``InvalidRequest`` where the chat template shows other images than ``seen``.
        """
        left = {is_video: deque(one for one in seen if one.shown.is_video is is_video) for is_video in (False, True)}
        order: list[Picture] = []

        def expand(found: re.Match[str]) -> str:
            of_kind = left[found[0] == self.video_marker]
            if not of_kind:
                raise self._other_images(len(seen))
            one = of_kind.popleft()
            order.extend(one.pictures)
            return self._folded(one)

        text = self._marker.sub(expand, text)
        if left[False] or left[True]:
            raise self._other_images(len(seen))
        token_ids: list[int] = []
        pictures: list[Picture] = []
        for token_id in self._tokenizer.encode(text, add_special_tokens=add_special_tokens):
            if token_id not in self._ids:
                token_ids.append(token_id)
                continue
            if len(pictures) == len(order):
                raise self._other_images(len(seen))
            picture = order[len(pictures)]
            pictures.append(msgspec.structs.replace(picture, offset=len(token_ids)))
            token_ids += [token_id] * picture.num_tokens
        if len(pictures) < len(order):
            raise self._other_images(len(seen))
        return token_ids, tuple(pictures)

    def _folded(self, seen: "Seen") -> str:
        """Return an expansion's text with one placeholder for each picture's.

        A picture may take thousands, and each is a dozen characters to the tokenizer.
        """
        placeholder = self._placeholders[seen.shown.is_video]
        assert placeholder is not None, "a family without videos makes nothing of one"
        pieces: list[str] = []
        rest = seen.text
        for picture in seen.pictures:
            before, run, rest = rest.partition(placeholder * picture.num_tokens)
            assert run, "a processor writes the placeholders of each of its pictures"
            pieces += (before, placeholder)
        return "".join([*pieces, rest])

    def _other_images(self, num_shown: int) -> InvalidRequest:
        return InvalidRequest(
            f"the model's chat template does not show the {num_shown} images of this request, each once; "
            "put them in messages of the user, or send another chat_template_kwargs",
            param="messages",
        )


def _only_id(placeholder: str, tokenizer: Tokenizer) -> int:
    token_ids = tokenizer.encode(placeholder, add_special_tokens=False)
    if len(token_ids) != 1:
        raise ModelUnreadable(
            f"{placeholder} stands for an image and is {len(token_ids)} tokens to this model's tokenizer.json, which "
            "must have it as one: copy or download the model again."
        )
    return token_ids[0]
