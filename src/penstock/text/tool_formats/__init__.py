"""How families of models write the calls of tools: each format is a sibling module with its parser and its grammar."""

from penstock.text.tool_formats.base import Arguments, CallBegins, Content, Event, Tool, ToolFormat, ToolParser
from penstock.text.tool_formats.hermes import Hermes
from penstock.text.tool_formats.llama3_json import Llama3JSON
from penstock.text.tool_formats.mistral import Mistral
from penstock.text.tool_formats.mistral_args import MistralArgs
from penstock.text.tool_formats.qwen3_coder import Qwen3Coder

_ALL: tuple[ToolFormat, ...] = (Hermes(), Llama3JSON(), Mistral(), MistralArgs(), Qwen3Coder())
FORMATS = {one.name: one for one in _ALL}


def format_of(template: str) -> ToolFormat | None:
    """Return the format that a chat template teaches, if it is known."""
    return next((one for one in FORMATS.values() if one.recognizes(template)), None)


__all__ = [
    "FORMATS",
    "Arguments",
    "CallBegins",
    "Content",
    "Event",
    "Tool",
    "ToolFormat",
    "ToolParser",
    "format_of",
]
