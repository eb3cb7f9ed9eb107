"""The messages of a chat, their parts, and what chat templates are given of them."""

from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import Field, PrivateAttr, Tag

from penstock.errors import InvalidRequest
from penstock.images.shown import Shown
from penstock.server.strict import Strict, Text, Unreadable, kind_among


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class ImageURL(Strict):
    """Where an image is, and how closely to look at it."""

    url: str
    """A data: URL, or one that the server may fetch"""
    detail: Literal["auto", "low", "high", "original"] | None = None


class _ShownPart(Strict):
    _place: str | None = PrivateAttr(None)
    """Where the caller wrote it, if that was in another form of request"""

    def at(self, place: str) -> Self:
        """Return the part, written at ``place`` of a request."""
        self._place = place
        return self

    @property
    def place(self) -> str | None:
        """Where the caller wrote it, if that was not here."""
        return self._place


class ImagePart(_ShownPart):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class VideoURL(Strict):
    """A video within its URL."""

    url: str


class VideoPart(_ShownPart):
    """A video in a message, as vLLM names it."""

    type: Literal["video_url"]
    video_url: VideoURL


class OtherPart(Unreadable):
    """Any other part."""

    known = "text, image_url and video_url"


Part = Annotated[
    Annotated[TextPart, Tag("[text]")]
    | Annotated[ImagePart, Tag("[image_url]")]
    | Annotated[VideoPart, Tag("[video_url]")]
    | Annotated[OtherPart, Tag("[other]")],
    kind_among("text", "image_url", "video_url"),
]


class CalledFunction(Strict):
    """What was called, and with what."""

    name: str = Field(max_length=256)
    arguments: Text
    """A JSON object, as text"""


class ToolCall(Strict):
    """A call that the model made."""

    id: str = Field(max_length=256)
    type: Literal["function"]
    function: CalledFunction

    def as_template_input(self) -> dict[str, Any]:
        """Return the call as chat templates expect it, with its arguments as an object."""
        arguments = msgspec.json.decode(self.function.arguments or "{}", type=dict[str, Any])
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=256)] = None
    """Of an assistant"""
    tool_call_id: str | None = Field(None, max_length=256)
    """Of a tool: what it answers"""
    reasoning_content: Text | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    """These come back with answers that clients repeat as they got them."""

    def as_template_input(self, place: int) -> dict[str, Any]:
        """Return the turn, number ``place`` of its conversation, as chat templates expect it.

        Its text is in one piece; where it shows images, in parts, of those ``{"type": "image"}`` or ``"video"``.
        Raises ``InvalidRequest`` for what does not fit its role, or arguments of a call that are not a JSON object.
        """
        self._check_role(f"messages.{place}")
        turn: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self._template_content(),
        }
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                turn[name] = getattr(self, name)
        calls = []
        for i, call in enumerate(self.tool_calls or ()):
            try:
                calls.append(call.as_template_input())
            except (msgspec.DecodeError, RecursionError) as error:
                param = f"messages.{place}.tool_calls.{i}.function.arguments"
                raise InvalidRequest(f"{param} is not a JSON object: {error}", param=param) from error
        return {**turn, "tool_calls": calls} if calls else turn

    def _template_content(self) -> str | list[dict[str, Any]]:
        content = self.content or ""
        if isinstance(content, str):
            return content
        parts: list[dict[str, Any]] = []
        for is_text, run in groupby(content, lambda part: isinstance(part, TextPart)):
            if is_text:
                parts.append({"type": "text", "text": "".join(part.text for part in run if isinstance(part, TextPart))})
            else:
                parts += [{"type": "image" if isinstance(part, ImagePart) else "video"} for part in run]
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        return parts

    def shown(self, place: int) -> Iterator[Shown]:
        """Yield the images and videos of the turn, number ``place``. Raises ``InvalidRequest`` for whose turn it is."""
        for i, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if not isinstance(part, ImagePart | VideoPart):
                continue
            where = part.place or f"messages.{place}.content.{i}.{part.type}"
            if self.role not in ("user", "tool"):
                raise InvalidRequest(f"{where}: a message of {self.role} shows no images", param=where)
            if isinstance(part, VideoPart):
                yield Shown(place=where, url=part.video_url.url, is_video=True)
            else:
                wanted = part.image_url.detail or "auto"
                yield Shown(place=where, url=part.image_url.url, detail="high" if wanted == "original" else wanted)

    def _check_role(self, param: str) -> None:
        if self.content is None and not self.tool_calls:
            how = "null" if "content" in self.model_fields_set else "missing"
            raise InvalidRequest(f"{param}.content is {how}", param=f"{param}.content")
        if self.tool_calls is not None and self.role != "assistant":
            raise InvalidRequest(f"{param}.tool_calls: only an assistant calls tools", param=f"{param}.tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            how = "is missing" if self.role == "tool" else "is a tool's to give"
            raise InvalidRequest(f"{param}.tool_call_id {how}", param=f"{param}.tool_call_id")
