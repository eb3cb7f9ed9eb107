"""From a request for a response to the chat completion that answers it, and to what a response repeats of it."""

import time
from collections.abc import Sequence
from typing import Any

from penstock.errors import InvalidRequest
from penstock.protocol import SamplingParams
from penstock.server import chat_messages
from penstock.server.responses.schemas import (
    CallItem,
    Content,
    ImagePart,
    Item,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    ResponsesRequest,
    ResultItem,
    SchemaFormat,
    TextPart,
)
from penstock.server.schemas import ChatCompletionRequest
from penstock.server.translation import Places, as_chat

PLACES: Places = (
    (r"^messages.*", "input"),
    (r"^tools\.(\d+)\.function\.", r"tools.\1."),
    (r"^tool_choice\.function\.", "tool_choice."),
    (r"^response_format\.json_schema\.schema", "text.format.schema"),
    (r"^response_format", "text.format"),
    (r"^max_completion_tokens", "max_output_tokens"),
)


def chat_of(body: ResponsesRequest) -> ChatCompletionRequest:
    """Return the chat completion that answers ``body``. Raises ``InvalidRequest``."""
    choice: Any = body.tool_choice
    if isinstance(choice, NamedFunction):
        choice = {"type": "function", "function": {"name": choice.name}}
    shows_logprobs = "message.output_text.logprobs" in (body.include or ())
    if body.top_logprobs is not None and not shows_logprobs:
        raise InvalidRequest("top_logprobs needs include to have message.output_text.logprobs", param="top_logprobs")
    return as_chat(
        body,
        messages=_messages(body),
        max_completion_tokens=body.max_output_tokens,
        tools=_tools(body),
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        chat_template_kwargs=body.chat_template_kwargs,
        logprobs=shows_logprobs or None,
        top_logprobs=body.top_logprobs,
    )


def head(body: ResponsesRequest, sampling: SamplingParams, *, answer_id: str, model: str) -> dict[str, Any]:
    """Return a response without its output: what was asked, and how it is answered."""
    text = {"format": {"type": "text"}} if body.text is None or body.text.format is None else _dumped(body.text)
    effort, summary = (None, None) if body.reasoning is None else (body.reasoning.effort, body.reasoning.summary)
    choice = body.tool_choice
    return {
        "id": answer_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": effort, "summary": summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": text,
        "tool_choice": _dumped(choice) if isinstance(choice, NamedFunction) else choice or "auto",
        "tools": [{"parameters": None, "strict": None, **_dumped(tool)} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def _dumped(model: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = model.model_dump(exclude_none=True, by_alias=True)
    return dumped


def _tools(body: ResponsesRequest) -> list[dict[str, Any]] | None:
    if body.tools is None:
        return None
    return [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)} for tool in body.tools
    ]


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    wanted = None if body.text is None else body.text.format
    if isinstance(wanted, SchemaFormat):
        return {"type": "json_schema", "json_schema": {k: v for k, v in _dumped(wanted).items() if k != "type"}}
    return None if wanted is None else _dumped(wanted)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if body.instructions is not None:
        turns.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*turns, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        _add(turns, item, f"input.{i}")
    return turns


def _add(turns: list[dict[str, Any]], item: Item, place: str) -> None:
    """Add the item at ``place`` to a conversation.

    What one answer of the model's said in several items becomes one turn again.
    """
    match item:
        case MessageItem(role="assistant"):
            turn = _assistant(turns, lacking=("content", "tool_calls"))
            turn["content"] = _content(item.content, f"{place}.content")
        case MessageItem():
            turns.append({"role": item.role, "content": _content(item.content, f"{place}.content")})
        case ReasoningItem():
            turn = _assistant(turns, lacking=("reasoning_content", "content", "tool_calls"))
            turn["reasoning_content"] = "".join(part.text for part in item.content or item.summary)
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            calls = _assistant(turns).setdefault("tool_calls", [])
            calls.append({"id": item.call_id, "type": "function", "function": function})
        case ResultItem():
            content = _content(item.output, f"{place}.output")
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": content})


def _assistant(turns: list[dict[str, Any]], lacking: Sequence[str] = ()) -> dict[str, Any]:
    """Return the last turn if it is the assistant's and lacks these parts, else a new one."""
    if not turns or turns[-1]["role"] != "assistant" or not turns[-1].keys().isdisjoint(lacking):
        turns.append({"role": "assistant"})
    return turns[-1]


def _content(content: Content, place: str) -> str | list[chat_messages.Part]:
    if isinstance(content, str):
        return content
    parts: list[chat_messages.Part] = []
    for i, part in enumerate(content):
        match part:
            case TextPart():
                parts.append(chat_messages.TextPart(type="text", text=part.text))
            case ImagePart():
                shown = chat_messages.ImageURL(url=part.image_url, detail=part.detail)
                part_of_chat = chat_messages.ImagePart(type="image_url", image_url=shown)
                parts.append(part_of_chat.at(f"{place}.{i}.image_url"))
    return parts
