"""From tokens to text: one object per choice that knows what may be shown and when it is over."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

from penstock.protocol import FinishReason, SamplingParams
from penstock.text import StopMatcher, Tokenizer


class OutputStep(NamedTuple):
    """What one token did to one choice."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChoiceOutput:
    """Incremental text of one choice: whole characters only, stop strings held back, ends decided."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self._params = params
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._stop = StopMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._num_tokens = 0

    def extend(
        self, token_ids: Sequence[int], take: Callable[[int], bool], ending: Callable[[], Sequence[int]] = tuple
    ) -> list[OutputStep]:
        """Add tokens up to the one that ends the choice, if one does: what is behind it never was.

        ``take`` is told of each before and returns whether the grammar lets nothing follow; ``ending`` returns tokens
        whose text completes a choice that has come to its most tokens.
        """
        steps = []
        for token_id in token_ids:
            steps.append(self.push(token_id, is_complete=take(token_id), ending=ending))
            if steps[-1].finish_reason is not None:
                break
        return steps

    def push(
        self, token_id: int, *, is_complete: bool = False, ending: Callable[[], Sequence[int]] = tuple
    ) -> OutputStep:
        """Add a token; the first step with a ``finish_reason`` is the last.

        ``is_complete`` says that the grammar lets nothing follow, which ends the choice as end of sequence would.
        """
        params = self._params
        self._num_tokens += 1
        may_stop = self._num_tokens > params.min_tokens
        if may_stop and token_id in self._stop_token_ids:
            shown = self._detokenizer.push(token_id) if params.include_stop_str_in_output else ""
            return OutputStep(self.flush(shown), "stop", token_id)
        if may_stop and token_id in self._eos_token_ids:
            return OutputStep(self.flush(), "stop")
        text = self._detokenizer.push(token_id)
        is_last = is_complete or self._num_tokens >= params.max_tokens
        if is_last:
            if not is_complete:
                text += "".join(map(self._detokenizer.push, ending()))
            text += self._detokenizer.flush()
        if self._stop is not None:
            text, matched = self._stop.push(text, may_match=may_stop)
            if matched is not None:
                return OutputStep(text, "stop", matched)
            if is_last:
                text += self._stop.flush()
        if is_complete:
            return OutputStep(text, "stop")
        return OutputStep(text, "length" if is_last else None)

    def copy(self) -> "ChoiceOutput":
        """Return a second one that has taken the same tokens and goes its own way."""
        twin = copy.copy(self)
        twin._detokenizer = copy.copy(self._detokenizer)
        twin._stop = copy.copy(self._stop)
        return twin

    def flush(self, text: str = "") -> str:
        """Return the text that was held back and ``text`` behind it, when nothing can follow."""
        rest = text + self._detokenizer.flush()
        if self._stop is None:
            return rest
        certain, _ = self._stop.push(rest)
        return certain + self._stop.flush()
