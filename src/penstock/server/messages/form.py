"""A message as it grows, and the events that tell of it."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic_core import from_json

from penstock.errors import PenstockError
from penstock.http.errors import anthropic_body, status_of
from penstock.protocol import TokenDelta, TokenLogprobs
from penstock.server.reading import Reasoning
from penstock.server.rendering import Sights
from penstock.server.streaming import Tally
from penstock.server.turn import Said
from penstock.text.tool_formats import Arguments, CallBegins, Content, Event

_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}
"""Kinds of blocks -> their deltas, and the field of both that has the text"""


class MessageForm:
    """A ``Form``: blocks, the last of which may be open."""

    def __init__(
        self, *, answer_id: str, model: str, num_prompt_tokens: int, sights: Sights, call_id: Callable[[], str]
    ) -> None:
        """``call_id`` makes ids that go back to the model."""
        self._of_images = {**sights.details, **sights.warnings}
        self._message: dict[str, Any] = {
            "id": answer_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**_usage(num_prompt_tokens, 0, 0), **self._of_images},
        }
        self._call_id = call_id
        self._is_open = False
        self._pieces: list[str] = []
        """Of the open block's text or arguments"""

    def begin(self) -> list[Said]:
        """Begin the answer."""
        return [{"type": "message_start", "message": self._message}, {"type": "ping"}]

    def push(self, event: Event | Reasoning, logprobs: Sequence[TokenLogprobs]) -> list[Said]:
        """Add what the model said next."""
        match event:
            case Reasoning(text):
                return [*self._enter("thinking"), *self._add(text)]
            case Content(text):
                return [*self._enter("text"), *self._add(text)]
            case CallBegins(_, name):
                return self._begin({"type": "tool_use", "id": self._call_id(), "name": name, "input": {}})
            case Arguments(_, text):
                return self._add(text)

    def end(self, last: TokenDelta, tally: Tally) -> list[Said]:
        """End the answer."""
        said = self._finish()
        if not self._message["content"]:
            said += [*self._begin({"type": "text", "text": ""}), *self._finish()]
        stop = last.stop_reason if isinstance(last.stop_reason, str) else None
        ends = {"stop_reason": self._stop_reason(last, stop), "stop_sequence": stop}
        usage = _usage(tally.num_prompt_tokens, tally.num_cached_tokens, tally.num_output_tokens)
        costs: dict[str, Any] = {"usage": {**usage, **self._of_images}}
        if last.timeline is not None:
            costs["penstock"] = {"timeline": [last.timeline]}
        self._message |= {**ends, **costs}
        return [*said, {"type": "message_delta", "delta": ends, **costs}, {"type": "message_stop"}]

    def fail(self, error: PenstockError) -> list[Said]:
        """End the answer with an error."""
        return [anthropic_body(error.message, status_of(error))]

    def body(self) -> dict[str, Any]:
        """Return the message."""
        return self._message

    def _stop_reason(self, last: TokenDelta, stop: str | None) -> str:
        if last.finish_reason == "length":
            return "max_tokens"
        if any(block["type"] == "tool_use" for block in self._message["content"]):
            return "tool_use"
        return "end_turn" if stop is None else "stop_sequence"

    @property
    def _block(self) -> dict[str, Any]:
        """The last block."""
        block: dict[str, Any] = self._message["content"][-1]
        return block

    def _enter(self, kind: str) -> list[Said]:
        """Go on with the open block if it is of this kind, else with a new one."""
        if self._is_open and self._block["type"] == kind:
            return []
        return self._begin({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})

    def _begin(self, block: dict[str, Any]) -> list[Said]:
        said = self._finish()
        self._is_open, self._pieces = True, []
        self._message["content"].append(block)
        return [*said, {"type": "content_block_start", **self._place(), "content_block": dict(block)}]

    def _add(self, text: str) -> list[Said]:
        self._pieces.append(text)
        kind, name = _DELTAS.get(self._block["type"], ("input_json_delta", "partial_json"))
        return [{"type": "content_block_delta", **self._place(), "delta": {"type": kind, name: text}}]

    def _finish(self) -> list[Said]:
        """Close the open block, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        block, text = self._block, "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            block[_DELTAS[block["type"]][1]] = text
        return [{"type": "content_block_stop", **self._place()}]

    def _place(self) -> dict[str, Any]:
        return {"index": len(self._message["content"]) - 1}


def _object(text: str) -> dict[str, Any]:
    """Return arguments as an object: of those that were cut, what is whole, as Anthropic's clients do."""
    try:
        value = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(num_prompt_tokens: int, num_cached_tokens: int, num_output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": num_prompt_tokens - num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached_tokens,
        "output_tokens": num_output_tokens,
    }
