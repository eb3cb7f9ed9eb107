"""From a conversation to the tokens and pictures that a model reads."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from penstock.errors import InvalidRequest
from penstock.protocol import Picture
from penstock.server.pictures import PicturePlaces
from penstock.server.schemas import ChatCompletionRequest, TokenizeChatRequest
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from penstock.images.reader import ImageReader, Seen

T = TypeVar("T")

_LONG_TEXT_CHARS = 4096
"""Longer text is rendered and tokenized on a thread, so that others' streams do not wait for it."""
_MESSAGE_CHARS = 32
"""What a message costs a template, in characters of text, however short it is."""


@dataclass(frozen=True, slots=True)
class Sights:
    """What of a conversation is images, as its usage says it."""

    num_images: int = 0
    num_tokens: int = 0
    remarks: tuple[dict[str, str], ...] = ()
    """Of images that may not be what their sender thinks"""

    @property
    def details(self) -> dict[str, int]:
        """What the details of a prompt's tokens say, if there are images."""
        return {"image_tokens": self.num_tokens} if self.num_images else {}

    @property
    def warnings(self) -> dict[str, Any]:
        """What a usage says beside tokens, if there are remarks."""
        return {"warnings": self.remarks} if self.remarks else {}


NO_SIGHTS = Sights()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as the model reads it."""

    text: str
    """As the chat template wrote it: an image is one marker"""
    token_ids: list[int]
    pictures: tuple[Picture, ...]
    sights: Sights


class Renderer:
    """Renders conversations with a model's template, tokenizer and eyes, if it has any."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, images: "ImageReader | None") -> None:
        """Raises ``ModelUnreadable`` where the images' placeholders are not tokens."""
        self._tokenizer = tokenizer
        self._template = template
        self._images = images
        self._places = None if images is None else PicturePlaces(images.processor, tokenizer)

    async def render(
        self,
        body: ChatCompletionRequest | TokenizeChatRequest,
        *,
        most_image_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """Return the conversation of ``body``, whose model is told of ``tools``.

        Raises ``RequestError`` naming the parameter at fault, and ``Overloaded`` where too many images wait.
        """
        template = self._template
        if template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        messages = [message.as_template_input(place) for place, message in enumerate(body.messages)]
        shown = [one for place, message in enumerate(body.messages) for one in message.shown(place)]
        seen: list[Seen] = []
        if shown:
            if self._images is None:
                raise InvalidRequest(
                    f"{shown[0].place}: this model sees no images; send text alone, or serve a model that sees",
                    param=shown[0].place,
                )
            salt = body.cache_salt if isinstance(body, ChatCompletionRequest) else ""
            seen = await self._images.read(shown, most_image_tokens, salt)

        def run() -> Rendered:
            text = template.render(
                [self._fitted(template, message) for message in self._neutral(messages)],
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                tools=self._neutral(tools),
                variables=self._neutral(body.template_variables),
            )
            if self._places is None or not seen:
                token_ids = self._tokenizer.encode(text, add_special_tokens=body.add_special_tokens)
                return Rendered(text=text, token_ids=token_ids, pictures=(), sights=NO_SIGHTS)
            token_ids, pictures = self._places.tokens(text, seen, add_special_tokens=body.add_special_tokens)
            return Rendered(text=text, token_ids=token_ids, pictures=pictures, sights=_sights(seen))

        return await off_loop(run, sum(_num_chars(message["content"]) + _MESSAGE_CHARS for message in messages))

    def _neutral(self, value: T) -> T:
        return value if self._places is None else self._places.neutral(value)

    def _fitted(self, template: ChatTemplate, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with its content in a form that the template reads."""
        content = message["content"]
        if isinstance(content, str):
            if template.takes_text or not template.takes_parts:
                return message
            return {**message, "content": [{"type": "text", "text": content}]}
        if template.takes_parts:
            return message
        assert self._places is not None, "a model that sees no images is given text alone"
        markers = {"image": self._places.image_marker, "video": self._places.video_marker}
        return {**message, "content": "".join(part.get("text") or markers[part["type"]] or "" for part in content)}


def _num_chars(content: str | list[dict[str, Any]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)


def _sights(seen: "Sequence[Seen]") -> Sights:
    return Sights(
        len(seen),
        sum(one.num_tokens for one in seen),
        tuple(
            {"code": remark.code, "param": one.shown.place, "message": remark.message}
            for one in seen
            for remark in one.remarks
        ),
    )


async def off_loop(work: Callable[[], T], num_chars: int) -> T:
    """Return what ``work`` on so much text returns; on a thread if it takes long."""
    return await asyncio.to_thread(work) if num_chars > _LONG_TEXT_CHARS else work()
