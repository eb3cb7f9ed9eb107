"""What an engine's deltas become on the wire, for both endpoints, whole and streamed."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.http import sse
from penstock.http.errors import error_body
from penstock.protocol import Candidate, FinishReason, Timeline, TokenDelta, TokenLogprobs
from penstock.server.reading import AnswerReader, Reading, Reasoning
from penstock.server.rendering import NO_SIGHTS, Sights
from penstock.server.streaming import Deltas, Tally, guarded
from penstock.text import Tokenizer
from penstock.text.tool_formats import Arguments, CallBegins, Content, Event


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPrompts:
    """What answers show of their prompts."""

    token_ids: Sequence[Sequence[int]]
    echoes: Sequence[str] | None = None
    """Text to put before each one's answers"""
    num_alternatives: int | None = None
    """None: no log probabilities of their own; else as ``SamplingParams.prompt_logprobs``"""
    hides_output: bool = False
    """Show nothing else"""


@dataclass(slots=True)
class _Choice:
    """One choice as it grows."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    timeline: Timeline | None = None
    has_begun: bool = False
    """Whether a chat stream has said whose turn it is."""
    num_chars: int = 0
    """Of the tokens streamed with log probabilities, which the older endpoint counts."""
    reader: AnswerReader | None = None
    """Of a chat's answer"""
    has_calls: bool = False
    has_shown_prompt: bool = False


class Answer:
    """One response: its choices, what they cost, and their form on the wire."""

    def __init__(
        self,
        *,
        is_chat: bool,
        answer_id: str,
        model: str,
        num_choices: int,
        tokenizer: Tokenizer,
        wants_timeline: bool,
        summary: dict[str, Any],
        prompts: ShownPrompts,
        include_usage: bool = False,
        reading: Reading | None = None,
        sights: Sights = NO_SIGHTS,
    ) -> None:
        """``reading`` says how to read a chat's answers; ``include_usage`` has streams end with what they cost.

        ``sights`` is what of the prompt is images.
        """
        self._is_chat = is_chat
        self._tokenizer = tokenizer
        self._wants_timeline = wants_timeline
        self._summary = summary
        self._reading = reading
        self._prompts = prompts
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}
        self._num_choices = num_choices
        """For each prompt."""
        self._choices: dict[int, _Choice] = {}
        self._tally = Tally(summary)
        self._sights = sights
        self._include_usage = include_usage
        self._head = {"id": answer_id, "created": int(time.time()), "model": model}

    async def whole(self, deltas: Deltas) -> dict[str, Any]:
        """Take all deltas in and return the response's body."""
        async for prompt, delta in deltas:
            _, choice, delta = self._take(prompt, delta)
            choice.text.append(delta.text)
            choice.logprobs.extend(delta.logprobs)
        kind = "chat.completion" if self._is_chat else "text_completion"
        choices = [self._whole_choice(index, choice) for index, choice in sorted(self._choices.items())]
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(), **self._extra()}

    def stream(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events; an error after the first byte is one ``error`` event and then the end."""
        return guarded(
            self._stream(deltas), lambda error: [sse.event(msgspec.json.encode(error_body(error)))], self._summary
        )

    async def _stream(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        # With usage to come, every chunk before it says that it has none.
        no_usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        async with contextlib.aclosing(deltas):
            async for prompt, delta in deltas:
                index, choice, delta = self._take(prompt, delta)
                if self._is_chat and not choice.has_begun:
                    choice.has_begun = True
                    begin = {"role": "assistant", "content": ""}
                    yield self._event([self._chunk(index, begin, None, None, None)], **no_usage)
                content = self._streamed_content(choice, delta)
                if content or delta.logprobs or delta.finish_reason:
                    piece = self._streamed_choice(index, choice, delta, content)
                    if not choice.has_shown_prompt:
                        choice.has_shown_prompt = True
                        piece |= self._of_prompt(prompt)
                    yield self._event([piece], **no_usage)
        if self._include_usage or self._wants_timeline:
            usage = {"usage": self._usage()} if self._include_usage else {}
            yield self._event([], **usage, **self._extra())
        yield sse.DONE

    def _take(self, prompt: int, delta: TokenDelta) -> tuple[int, _Choice, TokenDelta]:
        """Count a delta; return its choice's index, the choice and what is to be shown of it, the prompt included."""
        if delta.prompt_logprobs:
            self._prompt_logprobs[prompt] = delta.prompt_logprobs
        index = prompt * self._num_choices + delta.index
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice()
            choice.reader = None if self._reading is None else AnswerReader(self._reading)
            delta = self._with_echo(prompt, delta)
        if self._prompts.hides_output and delta.finish_reason is not None:
            delta = msgspec.structs.replace(delta, finish_reason="length", stop_reason=None)
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            choice.timeline = delta.timeline
            self._tally.add(prompt, delta, hides_output=self._prompts.hides_output)
        return index, choice, delta

    def _with_echo(self, prompt: int, delta: TokenDelta) -> TokenDelta:
        """Return a choice's first delta with the prompt before it, if it is to be shown."""
        shown = self._prompts
        if shown.echoes is None:
            return delta
        text, logprobs = ("", ()) if shown.hides_output else (delta.text, delta.logprobs)
        scores = self._prompt_logprobs.get(prompt, ())
        if scores or delta.logprobs:
            first = TokenLogprobs(Candidate(shown.token_ids[prompt][0], 0.0, 0))
            logprobs = (first, *scores, *logprobs)
        return msgspec.structs.replace(delta, text=shown.echoes[prompt] + text, logprobs=logprobs)

    def _of_prompt(self, prompt: int) -> dict[str, Any]:
        """Return what vLLM adds to each choice: the prompt's log probabilities, none for its first token."""
        most = self._prompts.num_alternatives
        if most is None:
            return {}
        scores = [
            {str(one.token_id): self._alternative(one) for one in (*score.top[:most], score.chosen)}
            for score in self._prompt_logprobs.get(prompt, ())
        ]
        return {"prompt_logprobs": [None, *scores]}

    def _alternative(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "logprob": _finite(candidate.logprob),
            "rank": candidate.rank,
            "decoded_token": self._tokenizer.token_text(candidate.token_id),
        }

    def _usage(self) -> dict[str, Any]:
        tally = self._tally
        return {
            "prompt_tokens": tally.num_prompt_tokens,
            "completion_tokens": tally.num_output_tokens,
            "total_tokens": tally.num_prompt_tokens + tally.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": tally.num_cached_tokens, **self._sights.details},
            **self._sights.warnings,
        }

    def _extra(self) -> dict[str, Any]:
        if not self._wants_timeline:
            return {}
        return {"penstock": {"timeline": [choice.timeline for _, choice in sorted(self._choices.items())]}}

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        if choice.reader is not None:
            parts = self._parts(choice, choice.reader.push(text, is_last=True))
            message = {"role": "assistant", "content": None if choice.has_calls else "", "refusal": None, **parts}
            for call in message.get("tool_calls", ()):
                del call["index"]
            return {
                **self._ends(index, choice),
                "message": message,
                "logprobs": self._chat_logprobs(choice.logprobs),
            }
        return {
            **self._ends(index, choice),
            "text": text,
            "logprobs": self._text_logprobs(choice.logprobs, 0) if choice.logprobs else None,
        }

    def _ends(self, index: int, choice: _Choice) -> dict[str, Any]:
        reason = _finish_reason(choice)
        ends = {"index": index, "finish_reason": reason, "stop_reason": choice.stop_reason}
        return ends | self._of_prompt(index // self._num_choices)

    def _parts(self, choice: _Choice, events: Sequence[Event | Reasoning]) -> dict[str, Any]:
        """Return events as parts of a message, or of a streamed piece of one."""
        parts: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            match event:
                case Reasoning(text):
                    parts["reasoning_content"] = parts.get("reasoning_content", "") + text
                case Content(text):
                    parts["content"] = parts.get("content", "") + text
                case CallBegins(index, name):
                    choice.has_calls = True
                    assert self._reading is not None
                    function = {"name": name, "arguments": ""}
                    call_id = self._reading.call_id()
                    calls[index] = {"index": index, "id": call_id, "type": "function", "function": function}
                case Arguments(index, text):
                    call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
        return {**parts, "tool_calls": list(calls.values())} if calls else parts

    def _streamed_content(self, choice: _Choice, delta: TokenDelta) -> dict[str, Any] | str:
        if choice.reader is None:
            return delta.text
        return self._parts(choice, choice.reader.push(delta.text, is_last=delta.finish_reason is not None))

    def _streamed_choice(
        self, index: int, choice: _Choice, delta: TokenDelta, content: dict[str, Any] | str
    ) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if delta.logprobs and self._is_chat:
            logprobs = self._chat_logprobs(delta.logprobs)
        elif delta.logprobs:
            logprobs = self._text_logprobs(delta.logprobs, choice.num_chars)
            choice.num_chars += sum(map(len, logprobs["tokens"]))
        reason = None if delta.finish_reason is None else _finish_reason(choice)
        return self._chunk(index, content, logprobs, reason, delta.stop_reason)

    def _chunk(
        self,
        index: int,
        content: dict[str, Any] | str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        stop_reason: int | str | None,
    ) -> dict[str, Any]:
        chunk = {
            "index": index,
            "delta" if self._is_chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return chunk if stop_reason is None else {**chunk, "stop_reason": stop_reason}

    def _event(self, choices: Sequence[dict[str, Any]], **extra: Any) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return sse.event(msgspec.json.encode({**self._head, "object": kind, "choices": choices, **extra}))

    def _chat_logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return {"content": shown_logprobs(logprobs, self._tokenizer), "refusal": None} if logprobs else None

    def _text_logprobs(self, logprobs: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """Return the parallel lists of the older endpoint; offsets count characters of the tokens' own text."""
        tokens = [self._tokenizer.token_text(one.chosen.token_id) for one in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one.chosen.logprob) if one.chosen.rank else None for one in logprobs],
            "top_logprobs": [self._alternatives(one) if one.chosen.rank else None for one in logprobs],
            "text_offset": offsets,
        }

    def _alternatives(self, one: TokenLogprobs) -> dict[str, float]:
        """Return log probabilities by text, the chosen token among them; of tokens that look alike, the likeliest."""
        by_text: dict[str, float] = {}
        for candidate in sorted((*one.top, one.chosen), key=lambda candidate: candidate.rank):
            by_text.setdefault(self._tokenizer.token_text(candidate.token_id), _finite(candidate.logprob))
        return by_text


def shown_logprobs(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return log probabilities as chats and responses show them."""

    def shown(candidate: Candidate) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(candidate.token_id),
            "logprob": _finite(candidate.logprob),
            "bytes": list(tokenizer.token_bytes(candidate.token_id)),
        }

    return [{**shown(one.chosen), "top_logprobs": [shown(other) for other in one.top]} for one in logprobs]


def _finish_reason(choice: _Choice) -> str | None:
    return "tool_calls" if choice.has_calls and choice.finish_reason == "stop" else choice.finish_reason


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI sends for it."""
    return max(logprob, -9999.0)
