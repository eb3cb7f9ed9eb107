"""Tools that a request offers or demands: what the template is shown, how answers are read and held to them."""

import json
from dataclasses import dataclass
from typing import Any

from penstock.errors import InvalidRequest
from penstock.server.config import ServerConfig
from penstock.server.reading import Reading
from penstock.server.schemas import ChatCompletionRequest, NamedTool, TokenizeChatRequest
from penstock.server.structure import Structure
from penstock.text import Tokenizer
from penstock.text import grammar as grammars
from penstock.text.chat_template import ChatTemplate
from penstock.text.reasoning import CLOSE, OPEN
from penstock.text.tool_formats import FORMATS, Tool, ToolFormat, format_of
from penstock.text.tool_formats.base import Spelling, any_until

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conventions:
    """What a model's templates and its operator say about tools and reasoning."""

    tool_format: ToolFormat | None
    takes_tools: bool
    """Whether the template shows them to the model"""
    has_reasoning: bool

    @classmethod
    def of(cls, template: ChatTemplate | None, config: ServerConfig) -> "Conventions":
        """Read the templates' sources; ``config`` may name the format. Raises ``InvalidSetting``."""
        sources = {} if template is None else template.sources
        source = sources.get("tool_use") or sources.get("default", "")
        chosen = config.tool_call_parser
        return cls(
            tool_format=format_of(source) if chosen is None else FORMATS[chosen],
            takes_tools="tools" in source,
            has_reasoning=CLOSE in sources.get("default", ""),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """What one request says about tools."""

    shown: list[dict[str, Any]] | None
    """What the template is given"""
    tools: tuple[Tool, ...]
    """What may be called"""
    params: tuple[str, ...]
    """Where the request has the schema of each"""
    is_forced: bool
    is_strict: bool
    """Whether arguments that do not satisfy their schema would be wrong even where calls are voluntary"""
    is_parallel: bool


def tool_use(body: ChatCompletionRequest | TokenizeChatRequest, conventions: Conventions) -> ToolUse | None:
    """Return what ``body`` says about tools, None if it says nothing. Raises ``InvalidRequest``."""
    choice = body.tool_choice if isinstance(body, ChatCompletionRequest) else None
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        return None
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have the same name", param="tools")
    if choice == "none":
        return None
    if not conventions.takes_tools:
        raise InvalidRequest("this model's chat template has no place for tools; leave them out", param="tools")
    if conventions.tool_format is None:
        raise InvalidRequest(
            "it is not known how this model writes calls of tools; the operator can say so with --tool-call-parser",
            param="tools",
        )
    called = range(len(names))
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise InvalidRequest(
                f"{choice.function.name!r} is not one of the tools: {', '.join(names)}",
                param="tool_choice.function.name",
            )
        called = range(names.index(choice.function.name), names.index(choice.function.name) + 1)
    functions = [body.tools[i].function for i in called]
    is_parallel = isinstance(body, ChatCompletionRequest) and body.parallel_tool_calls is not False
    return ToolUse(
        shown=[tool.model_dump(exclude_none=True) for tool in body.tools],
        tools=tuple(
            Tool(name=one.name, schema=_NO_PARAMETERS if one.parameters is None else one.parameters)
            for one in functions
        ),
        params=tuple(f"tools.{i}.function.parameters" for i in called),
        is_forced=choice == "required" or isinstance(choice, NamedTool),
        is_strict=any(one.strict for one in functions),
        is_parallel=is_parallel and not isinstance(choice, NamedTool),
    )


def reading_of(use: ToolUse | None, conventions: Conventions, prompt: str) -> Reading:
    """Return how answers to ``prompt``, as the template rendered it, are to be read."""
    ends_open = prompt.rstrip().endswith(OPEN) if conventions.has_reasoning else None
    if use is None:
        return Reading(reasoning_is_open=ends_open)
    return Reading(
        reasoning_is_open=ends_open,
        tool_format=conventions.tool_format,
        tools=use.tools,
        most_calls=None if use.is_parallel else 1,
    )


def answers_to(
    structure: Structure | None, use: ToolUse | None, reading: Reading, tokenizer: Tokenizer
) -> Structure | None:
    """Return what an answer must match: reasoning first, if the model reasons, then calls of tools or ``structure``."""
    tool_format = reading.tool_format

    def spelling(mark: str) -> str:
        token_id = tokenizer.special_token_id(mark)
        return json.dumps(mark) if token_id is None else f"<[{token_id}]>"

    if use is None or tool_format is None:
        if structure is None or reading.reasoning_is_open is None:
            return structure
        answer, rules = "@content", ""
    elif structure is None and not use.is_forced:
        if not (tool_format.commits or use.is_strict):
            return None
        answer, rules = "answer", tool_format.offered(use.tools, spelling, is_parallel=use.is_parallel)
    else:
        answer = "answer" if use.is_forced or structure is None else "(answer | @content)"
        structure = None if use.is_forced else structure
        rules = tool_format.forced(use.tools, spelling, is_parallel=use.is_parallel)
    lark = f"start: {_reasoning(reading, spelling)}{answer}\n{any_until('thought', spelling(CLOSE))}\n{rules}"

    def write() -> str:
        return grammars.with_content(lark, None if structure is None else structure.write())

    schemas = {} if use is None else {param: tool.schema for param, tool in zip(use.params, use.tools, strict=True)}
    return Structure(
        param="tools" if structure is None else structure.param,
        write=write,
        schemas={**schemas, **(structure.schemas if structure is not None else {})},
        is_required=structure is not None or use is None or use.is_forced or use.is_strict,
    )


def _reasoning(reading: Reading, spelling: Spelling) -> str:
    """Return what comes before the answer."""
    if reading.reasoning_is_open is None:
        return ""
    thought = r"thought /[ \t\r\n]*/"
    return f"{thought} " if reading.reasoning_is_open else f"({spelling(OPEN)} {thought})? "
