"""What clients send to /v1/responses, read strictly."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from penstock.server.schemas import Effort, JSONObjectFormat, Sampling, TextFormat
from penstock.server.strict import Strict, Text, Unreadable, few_fields
from penstock.server.translation import refused

_KEEPS_NOTHING = "this server keeps no responses; send the whole conversation as input"
_Status = Literal["in_progress", "completed", "incomplete"]


class TextPart(Strict):
    """A piece of a message or of a tool's result."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    """These come back with what clients repeat as they got it."""


class ImagePart(Strict):
    """An image in a message or in a tool's result."""

    type: Literal["input_image"]
    # Before the URL, which then is missing: the first complaint is the one that is made.
    file_id: Annotated[
        None, BeforeValidator(refused("this server keeps no files; send the image as image_url, in a data: URL"))
    ] = None
    image_url: str
    """A data: URL, or one that the server may fetch"""
    detail: Literal["auto", "low", "high", "original"] | None = None


class OtherPart(Unreadable):
    """Any other part."""

    known = "input_text, output_text and input_image"


_TAGS = {"input_text": "[text]", "output_text": "[text]", "text": "[text]", "input_image": "[image]"}


def _part_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return _TAGS.get(kind, "[other]") if isinstance(kind, str) else "[other]"


Part = Annotated[
    Annotated[TextPart, Tag("[text]")] | Annotated[ImagePart, Tag("[image]")] | Annotated[OtherPart, Tag("[other]")],
    Discriminator(_part_kind),
]
Content = Text | Annotated[list[Part], Field(fail_fast=True)]


class MessageItem(Strict):
    """One turn, of either side."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: _Status | None = None
    phase: str | None = None


class CallItem(Strict):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    arguments: Text
    id: str | None = None
    status: _Status | None = None


class ResultItem(Strict):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: Content
    id: str | None = None
    name: str | None = None
    status: _Status | None = None


class ReasoningPart(Strict):
    """A piece of what the model thought."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(Strict):
    """What the model thought before it went on."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningPart], Field(fail_fast=True)] = Field(default_factory=list)
    content: Annotated[list[ReasoningPart], Field(fail_fast=True)] | None = None
    encrypted_content: Annotated[
        None, BeforeValidator(refused("this server encrypts no reasoning and reads none that is", ""))
    ] = None
    id: str | None = None
    status: _Status | None = None


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _item_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type", "message")
    return f"[{kind}]" if kind in _ITEMS else None


Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[CallItem, Tag("[function_call]")]
    | Annotated[ResultItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")],
    Discriminator(
        _item_kind,
        custom_error_type="item_type",
        custom_error_message="Its type can be message, function_call, function_call_output or reasoning",
    ),
]


def _input_kind(value: Any) -> str:
    return "[items]" if isinstance(value, list) else "[text]"


Input = Annotated[
    Annotated[Text, Tag("[text]")]
    | Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True), Tag("[items]")],
    Discriminator(_input_kind),
]


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    """The function that the model has to call."""

    type: Literal["function"]
    name: str = Field(max_length=256)


class SchemaFormat(Strict):
    """Answers that a JSON schema describes; it is always followed to the letter."""

    type: Literal["json_schema"]
    name: str = Field(min_length=1, max_length=256)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    """What the answer must look like."""

    format: Annotated[TextFormat | JSONObjectFormat | SchemaFormat, Discriminator("type")] | None = None
    verbosity: Annotated[None, BeforeValidator(refused("only medium is possible here", "medium"))] = None


class ReasoningOptions(Strict):
    """How much to think; what was thought is always shown whole, so that summaries are taken for granted."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(Strict):
    """How to stream."""

    include_obfuscation: bool | None = None
    """Taken; nothing is added to any event."""


class ResponsesRequest(Sampling):
    """POST /v1/responses."""

    input: Input
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: int | None = Field(None, ge=0)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    metadata: Annotated[dict[str, str] | None, BeforeValidator(few_fields)] = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: Annotated[None, BeforeValidator(refused(_KEEPS_NOTHING, False))] = None
    previous_response_id: Annotated[None, BeforeValidator(refused(_KEEPS_NOTHING))] = None
    conversation: Annotated[None, BeforeValidator(refused(_KEEPS_NOTHING))] = None
    background: Annotated[
        None, BeforeValidator(refused("this server keeps no responses to come back for; stream instead", False))
    ] = None
    prompt: Annotated[None, BeforeValidator(refused("this server keeps no prompts; send the input itself"))] = None
    truncation: Annotated[
        None, BeforeValidator(refused("input is never cut by itself; see truncate_prompt_tokens", "disabled"))
    ] = None
    service_tier: Annotated[
        None, BeforeValidator(refused("there is one tier; see penstock.priority", "auto", "default"))
    ] = None
    max_tool_calls: Annotated[
        None, BeforeValidator(refused("it limits tools that a server runs, and this one runs none"))
    ] = None
    prompt_cache_retention: Annotated[None, BeforeValidator(refused("only in_memory is possible", "in_memory"))] = None
