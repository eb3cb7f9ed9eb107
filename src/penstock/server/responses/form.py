"""A response as it grows, and the events that tell of it."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from penstock.errors import PenstockError, RequestError
from penstock.protocol import TokenDelta, TokenLogprobs
from penstock.server.answers import shown_logprobs
from penstock.server.reading import Reasoning
from penstock.server.rendering import Sights
from penstock.server.streaming import Tally
from penstock.server.turn import Said
from penstock.text import Tokenizer
from penstock.text.tool_formats import Arguments, CallBegins, Content, Event

_PART_OF = {"message": "output_text", "reasoning": "reasoning_text"}
"""Kinds of items that have one part, and what that is"""
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class ResponseForm:
    """A ``Form``: items, the last of which may be open."""

    def __init__(self, head: dict[str, Any], tokenizer: Tokenizer, sights: Sights, call_id: Callable[[], str]) -> None:
        """``head`` is the response without its output. ``call_id`` makes ids that go back to the model."""
        self._response = head
        self._tokenizer = tokenizer
        self._sights = sights
        self._call_id = call_id
        self._num_said = 0
        self._is_open = False
        self._pieces: list[str] = []
        """Of the open item's text or arguments"""
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[Said]:
        """Begin the answer."""
        return [self._said(f"response.{name}", response=self._response) for name in ("created", "in_progress")]

    def push(self, event: Event | Reasoning, logprobs: Sequence[TokenLogprobs]) -> list[Said]:
        """Add what the model said next."""
        match event:
            case Reasoning(text):
                return [*self._enter("reasoning"), *self._add(text)]
            case Content(text):
                return [*self._enter("message"), *self._add(text, shown_logprobs(logprobs, self._tokenizer))]
            case CallBegins(_, name):
                return self._begin({"type": "function_call", "call_id": self._call_id(), "name": name, "arguments": ""})
            case Arguments(_, text):
                return self._add(text)

    def end(self, last: TokenDelta, tally: Tally) -> list[Said]:
        """End the answer."""
        is_cut = last.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        said = self._finish(status)
        if not is_cut and all(item["type"] == "reasoning" for item in self._response["output"]):
            said += [*self._begin({"type": "message", "role": "assistant"}), *self._finish(status)]
        self._response.update(
            status=status,
            completed_at=None if is_cut else int(time.time()),
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            usage={
                "input_tokens": tally.num_prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": tally.num_cached_tokens,
                    "cache_write_tokens": 0,
                    **self._sights.details,
                },
                "output_tokens": tally.num_output_tokens,
                "output_tokens_details": {"reasoning_tokens": tally.num_reasoning_tokens},
                "total_tokens": tally.num_prompt_tokens + tally.num_output_tokens,
                **self._sights.warnings,
            },
        )
        if last.timeline is not None:
            self._response["penstock"] = {"timeline": [last.timeline]}
        return [*said, self._said(f"response.{status}", response=self._response)]

    def fail(self, error: PenstockError) -> list[Said]:
        """End the answer with an error, said by itself and in the response."""
        code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
        self._response.update(status="failed", error={"code": code, "message": error.message})
        return [
            self._said("error", code=error.code, message=error.message, param=error.param),
            *self._finish("incomplete"),
            self._said("response.failed", response=self._response),
        ]

    def body(self) -> dict[str, Any]:
        """Return the response."""
        return self._response

    @property
    def _item(self) -> dict[str, Any]:
        """The last item."""
        item: dict[str, Any] = self._response["output"][-1]
        return item

    def _enter(self, kind: str) -> list[Said]:
        """Go on with the open item if it is of this kind, else with a new one."""
        if self._is_open and self._item["type"] == kind:
            return []
        return self._begin({"type": kind, **({"role": "assistant"} if kind == "message" else {"summary": []})})

    def _begin(self, item: dict[str, Any]) -> list[Said]:
        said = self._finish("completed")
        kind = item["type"]
        item |= {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "status": "in_progress"}
        self._is_open, self._pieces, self._logprobs = True, [], []
        self._response["output"].append(item)
        if kind == "function_call":
            return [*said, self._said("response.output_item.added", **self._place(), item=dict(item))]
        item["content"] = []
        return [
            *said,
            self._said("response.output_item.added", **self._place(), item=dict(item)),
            self._said("response.content_part.added", **self._in_part(), part=self._part()),
        ]

    def _add(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Said]:
        self._pieces.append(text)
        self._logprobs.extend(logprobs)
        kind = self._item["type"]
        if kind == "function_call":
            return [self._said("response.function_call_arguments.delta", **self._in_item(), delta=text)]
        more = {"logprobs": logprobs} if kind == "message" else {}
        return [self._said(f"response.{_PART_OF[kind]}.delta", **self._in_part(), delta=text, **more)]

    def _finish(self, status: str) -> list[Said]:
        """Close the open item, if there is one."""
        if not self._is_open:
            return []
        item, text = self._item, "".join(self._pieces)
        kind = item["type"]
        self._is_open = False
        if kind == "function_call":
            item |= {"arguments": text, "status": status}
            told = {"arguments": text, "name": item["name"]}
            said = [self._said("response.function_call_arguments.done", **self._in_item(), **told)]
        else:
            part = self._part()
            item |= {"content": [part], "status": status}
            more = {"logprobs": self._logprobs} if kind == "message" else {}
            said = [
                self._said(f"response.{_PART_OF[kind]}.done", **self._in_part(), text=text, **more),
                self._said("response.content_part.done", **self._in_part(), part=part),
            ]
        return [*said, self._said("response.output_item.done", **self._place(), item=item)]

    def _part(self) -> dict[str, Any]:
        """Return the open item's part as it is now."""
        kind, text = self._item["type"], "".join(self._pieces)
        more = {"annotations": [], "logprobs": list(self._logprobs)} if kind == "message" else {}
        return {"type": _PART_OF[kind], "text": text, **more}

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._response["output"]) - 1}

    def _in_item(self) -> dict[str, Any]:
        return {**self._place(), "item_id": self._item["id"]}

    def _in_part(self) -> dict[str, Any]:
        return {**self._in_item(), "content_index": 0}

    def _said(self, kind: str, /, **fields: Any) -> Said:
        said = {"type": kind, "sequence_number": self._num_said, **fields}
        self._num_said += 1
        return said
