"""What clients send to /v1/messages, read strictly."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from penstock.server.schemas import Sampling
from penstock.server.strict import Strict, Text, Texts, Unreadable, kind_among
from penstock.server.translation import refused


class _Cached(Strict):
    cache_control: dict[str, Any] | None = None
    """Taken: every prefix is cached here, marked or not"""


class TextBlock(_Cached):
    """A piece of text."""

    type: Literal["text"]
    text: Text
    citations: list[Any] | None = None


class ThinkingBlock(Strict):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: Text
    signature: str = ""
    """Nothing is signed here, and no signature is checked"""


class CallBlock(_Cached):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class Base64Source(Strict):
    """An image within the request."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    """Taken: what the image is, it says itself"""
    data: str

    @property
    def as_url(self) -> str:
        """The image as a data: URL."""
        return f"data:{self.media_type};base64,{self.data}"


class URLSource(Strict):
    """An image that the server may fetch."""

    type: Literal["url"]
    url: str

    @property
    def as_url(self) -> str:
        """Where it is."""
        return self.url


class FileSource(Strict):
    """An image that was sent before."""

    type: Literal["file"]

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise PydanticCustomError("source_type", "This server keeps no files; send the image as base64")


class ImageBlock(_Cached):
    """An image."""

    type: Literal["image"]
    source: Annotated[Base64Source | URLSource | FileSource, Discriminator("type")]
    transformations: Annotated[None, BeforeValidator(refused("images are resized as the model's family does", {}))] = (
        None
    )


class OtherThanText(Unreadable):
    """No block of text."""

    known = "text"


class OtherThanShown(Unreadable):
    """No block of what a tool may return."""

    known = "text and image"


class OtherBlock(Unreadable):
    """Any other block."""

    known = "text, image, thinking, tool_use and tool_result"


_TextOnly = Annotated[
    Annotated[TextBlock, Tag("[text]")] | Annotated[OtherThanText, Tag("[other]")], kind_among("text")
]
TextContent = Text | Annotated[list[_TextOnly], Field(fail_fast=True)]
_Shown = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ImageBlock, Tag("[image]")]
    | Annotated[OtherThanShown, Tag("[other]")],
    kind_among("text", "image"),
]


class ResultBlock(_Cached):
    """What a call returned; a failure is told by its content."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: Text | Annotated[list[_Shown], Field(fail_fast=True)] | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ImageBlock, Tag("[image]")]
    | Annotated[ThinkingBlock, Tag("[thinking]")]
    | Annotated[CallBlock, Tag("[tool_use]")]
    | Annotated[ResultBlock, Tag("[tool_result]")]
    | Annotated[OtherBlock, Tag("[other]")],
    kind_among("text", "image", "thinking", "tool_use", "tool_result"),
]


class Message(Strict):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Block], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        """Calls and thoughts are the assistant's, results and images the user's."""
        whose = {"tool_use": "assistant", "thinking": "assistant", "tool_result": "user", "image": "user"}
        for block in self.content if isinstance(self.content, list) else ():
            if whose.get(block.type, self.role) != self.role:
                raise PydanticCustomError(
                    "block_role", "A {kind} block is never of {role}", {"kind": block.type, "role": self.role}
                )
        return self


class Tool(_Cached):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    """Taken: arguments are always streamed as they come"""


class ToolChoice(Strict):
    """Whether and which tool to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, max_length=256)
    """Of the tool"""
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named_if_one(self) -> "ToolChoice":
        if (self.name is not None) != (self.type == "tool"):
            raise PydanticCustomError("tool_choice_name", "A name belongs to type tool, and to no other")
        return self


class Thinking(Strict):
    """Whether to think, for models whose template can be told. What is thought is shown, of any length."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized"] | None = None


class SchemaFormat(Strict):
    """Answers that a JSON schema describes."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """What the answer must look like and how much to think about it."""

    format: SchemaFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh"] | None = None


class Metadata(Strict):
    """Who the end user is; nothing depends on it."""

    user_id: str | None = Field(None, max_length=512)


class CountTokensRequest(Sampling):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    system: TextContent | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=256)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: Texts | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Annotated[
        None, BeforeValidator(refused("there is one tier; see penstock.priority", "auto", "standard_only"))
    ] = None
    container: Annotated[None, BeforeValidator(refused("this server runs no tools"))] = None
    mcp_servers: Annotated[None, BeforeValidator(refused("this server runs no tools", []))] = None


class ErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class MessagesError(BaseModel):
    """Every error's body."""

    type: Literal["error"]
    error: ErrorDetail
    request_id: str | None = None
