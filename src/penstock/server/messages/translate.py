"""From a request for a message to the chat completion that answers it."""

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.server.chat_messages import ImagePart, ImageURL, Part, TextPart
from penstock.server.messages.schemas import (
    CallBlock,
    CountTokensRequest,
    FileSource,
    ImageBlock,
    Message,
    MessagesRequest,
    ResultBlock,
    TextBlock,
    TextContent,
    ThinkingBlock,
    Tool,
    ToolChoice,
)
from penstock.server.schemas import ChatCompletionRequest
from penstock.server.strict import Unreadable
from penstock.server.translation import Places, as_chat

PLACES: Places = (
    # Where an image stands is known; where else in a message, is not.
    (r"^(messages\..*\.source)$", r"\1"),
    (r"^messages.*", "messages"),
    (r"^tools\.(\d+)\.function\.parameters", r"tools.\1.input_schema"),
    (r"^tools\.(\d+)\.function\.", r"tools.\1."),
    (r"^tool_choice\.function\.", "tool_choice."),
    (r"^response_format\.json_schema\.schema", "output_config.format.schema"),
    (r"^max_completion_tokens", "max_tokens"),
    (r"^stop$", "stop_sequences"),
)


def chat_of(body: CountTokensRequest) -> ChatCompletionRequest:
    """Return the chat completion that answers ``body``. Raises ``InvalidRequest``."""
    messages = [turn for i, message in enumerate(body.messages) for turn in _turns(message, f"messages.{i}.content")]
    if body.system is not None:
        messages.insert(0, {"role": "system", "content": _text(body.system)})
    choice = body.tool_choice
    config = body.output_config
    variables = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        variables.setdefault("enable_thinking", body.thinking.type != "disabled")
    return as_chat(
        body,
        messages=messages,
        # A message that ends with the assistant's words is to be gone on with.
        continue_final_message=messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1],
        tools=None if body.tools is None else [_tool(tool) for tool in body.tools],
        tool_choice=None if choice is None else _choice(choice),
        parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
        response_format=None if config is None or config.format is None else _format(config.format.schema_),
        reasoning_effort=None if config is None else config.effort,
        chat_template_kwargs=variables or None,
        **_of_answer(body),
    )


def _of_answer(body: CountTokensRequest) -> dict[str, Any]:
    if not isinstance(body, MessagesRequest):
        return {}
    return {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences}


def _choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": tool.strict}}


def _turns(message: Message, place: str) -> list[dict[str, Any]]:
    """Return a message as turns of a chat: results of tools first, each a turn, then what else there is.

    ``place`` is where the message's content stands.
    """
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    turns: list[dict[str, Any]] = []
    parts: list[Part] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(message.content):
        match block:
            case TextBlock() | ImageBlock():
                parts.append(_part(block, f"{place}.{i}"))
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case CallBlock():
                function = {"name": block.name, "arguments": msgspec.json.encode(block.input).decode()}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ResultBlock():
                result = _shown(block.content or "", f"{place}.{i}.content")
                turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
    if turns and not parts:
        return turns
    turn: dict[str, Any] = {"role": message.role, "content": parts}
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return [*turns, turn]


def _shown(content: str | Sequence[TextBlock | ImageBlock | Unreadable], place: str) -> str | list[Part]:
    if isinstance(content, str):
        return content
    return [_part(block, f"{place}.{i}") for i, block in enumerate(content) if not isinstance(block, Unreadable)]


def _part(block: TextBlock | ImageBlock, place: str) -> Part:
    if isinstance(block, TextBlock):
        return TextPart(type="text", text=block.text)
    assert not isinstance(block.source, FileSource), "it was refused"
    return ImagePart(type="image_url", image_url=ImageURL(url=block.source.as_url)).at(f"{place}.source")


def _text(content: TextContent) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content if isinstance(block, TextBlock))
