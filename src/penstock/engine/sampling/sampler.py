"""The sampler: [R, V] logits in, one token for each row out.

R rows, V vocabulary entries. Order of operations, as users of vLLM know it: logprobs are taken from the model's own
logits; then logit bias, repetition, frequency and presence penalties; then tokens are ruled out by minimum length,
lists of tokens and words, and grammars; then temperature; then typical_p; then min_p, top_k and top_p together cut the
tail.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.engine.sampling.masks import TokenMasks
from penstock.engine.sampling.noise import stream_seed, uniform
from penstock.engine.sampling.typical import atypical
from penstock.kernels.sampling import DrawRow, draw_tokens, top_tokens
from penstock.protocol import Candidate, SamplingParams, TokenLogprobs

_NO_DRAFTS: Mapping[int, Sequence[int]] = {}
_LIKELIEST = DrawRow(number=0.0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


class SampledToken(NamedTuple):
    """What one row became."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class _State:
    """What the sampler remembers of one sequence."""

    params: SamplingParams
    seed: int
    num_output_tokens: int = 0
    seen: "_Seen | None" = None
    """Tokens that occurred, if a penalty asks"""
    bias_ids: npt.NDArray[np.int64] | None = None
    bias_values: npt.NDArray[np.float32] | None = None
    forbidden_early: npt.NDArray[np.int64] | None = None
    """Token ids that may not come before ``min_tokens``"""
    not_allowed: npt.NDArray[np.float32] | None = None
    """[V] float32, -inf for tokens that are not, if only some are"""
    output: list[int] | None = None
    """Tokens so far, if a word is bad"""
    is_plain: bool = False
    """Whether tokens are drawn from what the model said, and nothing else is asked for"""

    def after(self, token_ids: Sequence[int]) -> "_State":
        """Return what the state would be with these tokens more."""
        return replace(
            self,
            num_output_tokens=self.num_output_tokens + len(token_ids),
            seen=None if self.seen is None else self.seen.after(token_ids),
            output=None if self.output is None else [*self.output, *token_ids],
        )

    @property
    def changes_logits(self) -> bool:
        """Whether bias, penalties or what rules tokens out may change what the model said."""
        return (
            self.bias_ids is not None
            or self.forbidden_early is not None
            or self.seen is not None
            or self.not_allowed is not None
            or self.output is not None
            or self.params.grammar is not None
            or self.is_typical
        )

    @property
    def is_typical(self) -> bool:
        """Whether tokens that are not typical are to be left out."""
        return self.params.typical_p < 1 and self.params.temperature > 0

    def forbidden(self) -> npt.NDArray[np.int64] | None:
        """Return the ids of tokens that may not come next, besides those that are never allowed."""
        token_ids = []
        if self.output is not None:
            for word in self.params.bad_words:
                first = len(self.output) - len(word) + 1
                if first >= 0 and tuple(self.output[first:]) == word[:-1]:
                    token_ids.append(word[-1])
        found = np.array(token_ids, dtype=np.int64) if token_ids else None
        if self.forbidden_early is None or self.num_output_tokens >= self.params.min_tokens:
            return found
        return self.forbidden_early if found is None else np.concatenate([self.forbidden_early, found])


class _Seen:
    """The tokens that a sequence's prompt or output holds, and how often its output does: what penalties touch."""

    def __init__(self, prompt_token_ids: Sequence[int], *, most: int) -> None:
        """``prompt_token_ids`` are those that count as seen; ``most`` bounds the output's tokens."""
        distinct = list(dict.fromkeys(prompt_token_ids))
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._token_ids = np.zeros(len(distinct) + most, dtype=np.int64)
        self._token_ids[: len(distinct)] = distinct
        self._counts = np.zeros(len(self._token_ids), dtype=np.float32)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        self._token_ids[place] = token_id
        self._counts[place] += 1

    def after(self, token_ids: Sequence[int]) -> "_Seen":
        """Return these and some more, with no room for others."""
        later = _Seen((), most=0)
        later._places = self._places.copy()
        later._token_ids = np.pad(self.token_ids, (0, len(token_ids)))
        later._counts = np.pad(self.counts, (0, len(token_ids)))
        for token_id in token_ids:
            later.add(token_id)
        return later

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        return self._token_ids[: len(self._places)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """In the output; 0 where only the prompt holds it"""
        return self._counts[: len(self._places)]


class Sampler:
    """Keeps each sequence's parameters from ``add`` to ``remove`` and samples a whole batch at a time."""

    def __init__(self, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._states: dict[int, _State] = {}

    def add(self, sequence_id: int, index: int, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        """Begin to sample for choice ``index`` of a request."""
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        state = _State(params, stream_seed(seed, index))
        if params.logit_bias:
            state.bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
            state.bias_values = np.array(list(params.logit_bias.values()), dtype=np.float32)
        if params.min_tokens:
            forbidden = {*self._eos_token_ids, *params.stop_token_ids}
            state.forbidden_early = np.array(sorted(forbidden), dtype=np.int64)
        if params.repetition_penalty != 1:
            state.seen = _Seen(prompt_token_ids, most=params.max_tokens)
        elif params.presence_penalty or params.frequency_penalty:
            state.seen = _Seen((), most=params.max_tokens)
        if params.allowed_token_ids is not None:
            state.not_allowed = np.full(self._vocab_size, -np.inf, dtype=np.float32)
            state.not_allowed[np.array(params.allowed_token_ids, dtype=np.int64)] = 0
        if params.bad_words:
            state.output = []
        state.is_plain = params.logprobs is None and not state.changes_logits
        self._states[sequence_id] = state

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
        self._states.pop(sequence_id, None)

    def commit(self, sequence_id: int, token_id: int) -> None:
        """Take a token that was kept into the sequence's history."""
        state = self._states[sequence_id]
        state.num_output_tokens += 1
        if state.seen is not None:
            state.seen.add(token_id)
        if state.output is not None:
            state.output.append(token_id)

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        sequence_ids: Sequence[int],
        masks: TokenMasks | None = None,
        drafts: Mapping[int, Sequence[int]] = _NO_DRAFTS,
    ) -> list[SampledToken | None]:
        """Pick a token for each row; None where a row's logits are not numbers.

        logits  [R, V] float32; may be overwritten
        masks   what grammars allow in some of the rows
        drafts  guesses at what follows a sequence, whose rows stand together: each is sampled as if one more were true
        Changes no state: ``commit`` does, once the token is kept.
        """
        states = [self._states[sequence_id] for sequence_id in sequence_ids]
        if drafts:
            self._follow(drafts, states, sequence_ids)
        logprobs: dict[int, _RawLogprobs] = {}
        spoiled: set[int] = set()
        if rows := [row for row, state in enumerate(states) if not state.is_plain]:
            logprobs = self._take_logprobs(logits, states, rows)
            spoiled = self._adjust(logits, states, rows, masks)
        tokens = draw_tokens(logits, [_draw_row(state) for state in states])
        return [
            None
            if token_id < 0 or row in spoiled
            else SampledToken(token_id, logprobs[row].of(token_id) if row in logprobs else None)
            for row, token_id in enumerate(tokens)
        ]

    def plain_draws(self, sequence_ids: Sequence[int]) -> list[DrawRow] | None:
        """Return how each sequence's next token is drawn if that is all ``sample`` would do; None if it is not."""
        states = [self._states[sequence_id] for sequence_id in sequence_ids]
        return [_draw_row(state) for state in states] if all(state.is_plain for state in states) else None

    def may_go_on(self, sequence_ids: Sequence[int]) -> bool:
        """Return whether none of the sequences is to end with its next token, whatever that is."""
        states = (self._states[sequence_id] for sequence_id in sequence_ids)
        return all(state.num_output_tokens + 1 < state.params.max_tokens for state in states)

    def guess(
        self, logits: npt.NDArray[np.float32], sequence_ids: Sequence[int], guessed: Sequence[Sequence[int]]
    ) -> list[int | None]:
        """Pick a token for each row of another model's ``logits`` [R, V] as ``sample`` would, all ``guessed`` true.

        Grammars are not followed.
        """
        states = [
            self._states[sequence_id].after(token_ids)
            for sequence_id, token_ids in zip(sequence_ids, guessed, strict=True)
        ]
        self._adjust(logits, states, range(len(states)), None)
        return [
            None if token_id < 0 else token_id
            for token_id in draw_tokens(logits, [_draw_row(state) for state in states])
        ]

    def _follow(self, drafts: Mapping[int, Sequence[int]], states: list[_State], sequence_ids: Sequence[int]) -> None:
        """Replace the states of rows behind guesses by what they would be if these were true."""
        row = 0
        while row < len(states):
            for token_id in drafts.get(sequence_ids[row], ()):
                row += 1
                states[row] = states[row - 1].after([token_id])
            row += 1

    def score(
        self, logits: npt.NDArray[np.float32], targets: Sequence[int], sequence_ids: Sequence[int]
    ) -> list[TokenLogprobs]:
        """Return how likely each of ``targets`` [C] is in its row of ``logits`` [C, V], one of ``sequence_ids`` [C]."""
        wanted = {
            row: self._states[sequence_id].params.prompt_logprobs or 0 for row, sequence_id in enumerate(sequence_ids)
        }
        taken = self._raw_logprobs(logits, wanted)
        return [taken[row].of(target) for row, target in enumerate(targets)]

    def _take_logprobs(
        self, logits: npt.NDArray[np.float32], states: list[_State], rows: Sequence[int]
    ) -> "dict[int, _RawLogprobs]":
        """Return the log probabilities of those of ``rows`` that are asked for them."""
        asked = ((row, states[row].params.logprobs) for row in rows)
        wanted = {row: number for row, number in asked if number is not None}
        taken = self._raw_logprobs(logits, wanted) if wanted else {}
        for row, raw in taken.items():
            if states[row].changes_logits:
                taken[row] = replace(raw, logits=raw.logits.copy())
        return taken

    def _raw_logprobs(self, logits: npt.NDArray[np.float32], wanted: dict[int, int]) -> dict[int, "_RawLogprobs"]:
        """Return the log probabilities of the rows in ``wanted``, and as many of the likeliest tokens as it says.

        They may share memory with ``logits``.
        """
        values = logits if len(wanted) == len(logits) else logits[list(wanted)]
        top = top_tokens(values, min(max(wanted.values()), self._vocab_size))
        taken = {}
        for i, (row, k) in enumerate(wanted.items()):
            log_total = top.log_totals[i]
            candidates = tuple(
                Candidate(token_id, logit - log_total, rank + 1)
                for rank, (token_id, logit) in enumerate(zip(top.tokens[i][:k], top.logits[i][:k], strict=True))
            )
            taken[row] = _RawLogprobs(values[i], log_total, candidates)
        return taken

    # What is no number stays so, and is found where tokens are drawn.
    @np.errstate(invalid="ignore", over="ignore")
    def _adjust(
        self, logits: npt.NDArray[np.float32], states: list[_State], rows: Sequence[int], masks: TokenMasks | None
    ) -> set[int]:
        """Apply bias, penalties and what rules tokens out to ``rows`` of ``logits`` in place.

        Returns the rows where a forbidden token's logit was no number, which can no longer be seen.
        """
        penalized: list[int] = []
        for row in rows:
            state = states[row]
            if state.bias_ids is not None and state.bias_values is not None:
                logits[row, state.bias_ids] += state.bias_values
            if state.seen is not None:
                penalized.append(row)
        if penalized:
            _penalize(logits, penalized, states)
        spoiled = self._rule_out(logits, states, rows, masks)
        typical = [row for row in rows if states[row].is_typical]
        if typical:
            spoiled |= _leave_typical(logits, typical, states)
        return spoiled

    def _rule_out(
        self, logits: npt.NDArray[np.float32], states: list[_State], rows: Sequence[int], masks: TokenMasks | None
    ) -> set[int]:
        """Rule tokens out of ``rows``, and return as ``_adjust``.

        Where all that would leave no token, a grammar counts alone, and without one what is allowed.
        """
        spoiled: set[int] = set()
        for row in rows:
            state = states[row]
            token_ids = state.forbidden()
            by_grammar = None if masks is None else masks.bias_of(row, self._vocab_size)
            bias = state.not_allowed if by_grammar is None else by_grammar
            if token_ids is not None:
                if not (logits[row, token_ids] < np.inf).all():
                    spoiled.add(row)
                if bias is None:
                    logits[row, token_ids] = -np.inf
            if bias is not None:
                together = bias
                if token_ids is not None:
                    together = bias.copy()
                    together[token_ids] = -np.inf
                if by_grammar is not None and state.not_allowed is not None:
                    together = together + state.not_allowed
                is_nothing = together is not bias and bool((together == -np.inf).all())
                # What is no number stays so under addition, and is found where the token is picked.
                logits[row] += bias if is_nothing else together
        return spoiled


def _penalize(logits: npt.NDArray[np.float32], rows: list[int], states: list[_State]) -> None:
    """Apply the penalties of ``rows`` to the tokens these have seen, all in one go."""
    seen = [state.seen for state in (states[row] for row in rows) if state.seen is not None]
    params = [states[row].params for row in rows]
    sizes = [len(one.token_ids) for one in seen]
    counts = np.concatenate([one.counts for one in seen])
    places = np.concatenate([one.token_ids for one in seen])
    places += np.repeat(np.array(rows, dtype=np.int64) * logits.shape[1], sizes)

    def of_each(values: list[float]) -> npt.NDArray[np.float32]:
        return np.repeat(np.array(values, dtype=np.float32), sizes)

    flat = logits.reshape(-1)
    some = flat[places]
    factor = of_each([p.repetition_penalty for p in params])
    some = np.where(some > 0, some / factor, some * factor)
    some -= of_each([p.frequency_penalty for p in params]) * counts
    some -= of_each([p.presence_penalty for p in params]) * (counts > 0)
    flat[places] = some


def _leave_typical(logits: npt.NDArray[np.float32], rows: list[int], states: list[_State]) -> set[int]:
    """Rule out what is not typical in ``rows``; return those whose logits are no numbers, which it would hide."""
    params = [states[row].params for row in rows]
    some = logits[rows]
    temperatures = np.array([[max(p.temperature, 1e-5)] for p in params], dtype=np.float32)
    dropped = atypical(some / temperatures, np.array([[p.typical_p] for p in params], dtype=np.float32))
    is_number = np.isfinite(some.max(-1)).tolist()
    logits[rows] = np.where(dropped, np.float32(-np.inf), some)
    return {row for row, is_one in zip(rows, is_number, strict=True) if not is_one}


def _draw_row(state: _State) -> DrawRow:
    params = state.params
    if params.temperature == 0:
        return _LIKELIEST
    # Subnormal temperatures would overflow to infinities of both signs; this one is greedy already.
    temperature = max(params.temperature, 1e-5)
    number = uniform(state.seed, state.num_output_tokens)
    return DrawRow(number, temperature, params.top_k, params.top_p, params.min_p)


@dataclass(slots=True, frozen=True)
class _RawLogprobs:
    """Log-probabilities of one row before anything was changed."""

    logits: npt.NDArray[np.float32]
    """[V]"""
    log_total: float
    top: tuple[Candidate, ...]

    def of(self, token_id: int) -> TokenLogprobs:
        logprob = float(self.logits[token_id]) - self.log_total
        if self.top and logprob >= self.top[-1].logprob:
            # Whatever is likelier is among the top.
            rank = sum(candidate.logprob > logprob for candidate in self.top) + 1
        else:
            rank = int(np.count_nonzero(self.logits > self.logits[token_id])) + 1
        return TokenLogprobs(Candidate(token_id, logprob, rank), self.top)
