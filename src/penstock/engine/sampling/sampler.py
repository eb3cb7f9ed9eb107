"""The sampler: [R, V] logits in, one token for each row out.

R rows, V vocabulary entries. Order of operations, as users of vLLM know it: logprobs are taken from the model's own
logits; then logit bias, minimum length, repetition, frequency and presence penalties; then temperature; then min_p,
top_k and top_p together cut the tail.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from penstock.engine.sampling.noise import stream_seed, uniforms
from penstock.protocol import Candidate, SamplingParams, TokenLogprobs

_NARROW = 1024
"""Candidates looked at before a full sort: top_p rarely needs more, and choosing these is far cheaper."""


@dataclass(slots=True, frozen=True)
class SampledToken:
    """What one row became."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class _State:
    """What the sampler remembers of one sequence."""

    params: SamplingParams
    seed: int
    num_output_tokens: int = 0
    is_plain_greedy: bool = True
    """Argmax of the raw logits is all it needs"""
    counts: Tensor | None = None
    """[V] int32 occurrences in the output, if a penalty asks"""
    in_prompt: Tensor | None = None
    """[V] bool, if the repetition penalty asks"""
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    forbidden_early: Tensor | None = None
    """Token ids that may not come before ``min_tokens``"""


@dataclass(slots=True)
class _Rows:
    """Rows that share a kind of work, with what it needs per row."""

    rows: list[int] = field(default_factory=list)
    states: list[_State] = field(default_factory=list)

    def add(self, row: int, state: _State) -> None:
        self.rows.append(row)
        self.states.append(state)


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
        state.is_plain_greedy = params.temperature == 0
        if params.logit_bias:
            state.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
            state.bias_values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        if params.min_tokens:
            forbidden = {*self._eos_token_ids, *params.stop_token_ids}
            state.forbidden_early = torch.tensor(sorted(forbidden), dtype=torch.int64)
        if params.repetition_penalty != 1:
            state.in_prompt = torch.zeros(self._vocab_size, dtype=torch.bool)
            state.in_prompt[torch.tensor(prompt_token_ids, dtype=torch.int64)] = True
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            state.counts = torch.zeros(self._vocab_size, dtype=torch.int32)
        if params.logit_bias or params.min_tokens or state.counts is not None or params.logprobs is not None:
            state.is_plain_greedy = False
        self._states[sequence_id] = state

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
        self._states.pop(sequence_id, None)

    def commit(self, sequence_id: int, token_id: int) -> None:
        """Take a token that was kept into the sequence's history."""
        state = self._states[sequence_id]
        state.num_output_tokens += 1
        if state.counts is not None:
            state.counts[token_id] += 1

    def sample(self, logits: Tensor, sequence_ids: Sequence[int]) -> list[SampledToken | None]:
        """Pick a token for each row; None where a row's logits are not numbers.

        logits  [R, V] float32; may be overwritten
        Changes no state: ``commit`` does, once the token is kept.
        """
        states = [self._states[sequence_id] for sequence_id in sequence_ids]
        highest, argmax = logits.max(dim=-1)
        # Infinity minus itself is not a number either, so one comparison finds both.
        is_finite = ((highest - highest) == 0).tolist()
        chosen = argmax.tolist()
        logprobs: dict[int, _RawLogprobs] = {}
        if not all(state.is_plain_greedy for state in states):
            logprobs = self._take_logprobs(logits, states)
            self._adjust(logits, states)
            greedy, random = _Rows(), _Rows()
            for row, state in enumerate(states):
                if not state.is_plain_greedy:
                    (random if state.params.temperature > 0 else greedy).add(row, state)
            if greedy.rows:
                for row, token_id in zip(greedy.rows, logits[greedy.rows].argmax(dim=-1).tolist(), strict=True):
                    chosen[row] = token_id
            if random.rows:
                for row, token_id in zip(random.rows, _draw(logits, random), strict=True):
                    chosen[row] = token_id
        return [
            SampledToken(token_id, logprobs[row].of(token_id) if row in logprobs else None) if is_finite[row] else None
            for row, token_id in enumerate(chosen)
        ]

    def _take_logprobs(self, logits: Tensor, states: list[_State]) -> dict[int, "_RawLogprobs"]:
        rows = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        if not rows:
            return {}
        values = torch.log_softmax(logits[rows], dim=-1)
        num_top = max(states[row].params.logprobs or 0 for row in rows)
        top = values.topk(min(num_top, self._vocab_size), dim=-1) if num_top else None
        taken = {}
        for i, row in enumerate(rows):
            k = states[row].params.logprobs or 0
            ids = top.indices[i, :k].tolist() if top is not None else []
            top_values = top.values[i, :k].tolist() if top is not None else []
            candidates = tuple(
                Candidate(t, v, rank + 1) for rank, (t, v) in enumerate(zip(ids, top_values, strict=True))
            )
            taken[row] = _RawLogprobs(values[i], candidates)
        return taken

    def _adjust(self, logits: Tensor, states: list[_State]) -> None:
        """Apply bias, minimum length and penalties to ``logits`` in place."""
        penalized = _Rows()
        for row, state in enumerate(states):
            if state.bias_ids is not None and state.bias_values is not None:
                logits[row].index_add_(0, state.bias_ids, state.bias_values)
            if state.forbidden_early is not None and state.num_output_tokens < state.params.min_tokens:
                logits[row, state.forbidden_early] = -torch.inf
            if state.counts is not None:
                penalized.add(row, state)
        if not penalized.rows:
            return
        some = logits[penalized.rows]
        counts = torch.stack([state.counts for state in penalized.states if state.counts is not None])
        params = [state.params for state in penalized.states]
        factor = _column([p.repetition_penalty for p in params])
        seen = counts > 0
        for i, state in enumerate(penalized.states):
            if state.in_prompt is not None:
                seen[i] |= state.in_prompt
        some = torch.where(seen, torch.where(some > 0, some / factor, some * factor), some)
        some -= _column([p.frequency_penalty for p in params]) * counts
        some -= _column([p.presence_penalty for p in params]) * (counts > 0)
        logits[penalized.rows] = some


@dataclass(slots=True, frozen=True)
class _RawLogprobs:
    """Log-probabilities of one row before anything was changed."""

    values: Tensor
    """[V]"""
    top: tuple[Candidate, ...]

    def of(self, token_id: int) -> TokenLogprobs:
        logprob = self.values[token_id]
        rank = int((self.values > logprob).sum()) + 1
        return TokenLogprobs(Candidate(token_id, float(logprob), rank), self.top)


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def _draw(logits: Tensor, random: _Rows) -> list[int]:
    """Return one token for each row of ``random`` by inverting its distribution at the request's own number."""
    params = [state.params for state in random.states]
    numbers = uniforms(
        np.array([state.seed for state in random.states], dtype=np.uint64),
        np.array([state.num_output_tokens for state in random.states], dtype=np.uint64),
    )
    # Subnormal temperatures would overflow to infinities of both signs; this one is greedy already.
    scaled = logits[random.rows] / _column([max(p.temperature, 1e-5) for p in params])
    tokens = [0] * len(params)
    cut = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    whole = [i for i in range(len(params)) if i not in set(cut)]
    if whole:
        probabilities = torch.softmax(scaled[whole], dim=-1, dtype=torch.float64)
        for i, token_id in zip(whole, _invert(probabilities, numbers[whole]).tolist(), strict=True):
            tokens[i] = token_id
    if cut:
        values, token_ids = _candidates(scaled[cut], [params[i] for i in cut])
        picks = _invert(torch.softmax(values, dim=-1, dtype=torch.float64), numbers[cut])
        for i, token_id in zip(cut, token_ids.gather(1, picks.unsqueeze(1)).squeeze(1).tolist(), strict=True):
            tokens[i] = token_id
    return tokens


def _candidates(scaled: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Return (logits, token ids), both [R, K], most likely first, of what top_k, top_p and min_p leave; cut ones -inf.

    Looks at the most likely ``_NARROW`` first and at all only where top_p or min_p reaches beyond them.
    """
    vocab_size = scaled.shape[-1]
    top_k = torch.tensor([p.top_k or vocab_size for p in params]).clamp_(max=vocab_size).unsqueeze(1)
    top_p, min_p = _column([p.top_p for p in params]), _column([p.min_p for p in params])
    log_total = torch.logsumexp(scaled, dim=-1, keepdim=True)
    num_looked_at = min(max(_NARROW, *(p.top_k for p in params)), vocab_size)
    while True:
        values, token_ids = scaled.topk(num_looked_at, dim=-1)
        probabilities = torch.exp(values - log_total)
        within_k = torch.arange(num_looked_at) < top_k
        # top_k first: top_p is a share of what it leaves, as the reference implementations have it.
        left = probabilities * within_k
        mass = torch.where(top_k < vocab_size, left.sum(-1, keepdim=True), 1.0)
        before = (left.cumsum(-1) - left) / mass
        keep = within_k & (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
        keep[:, 0] = True
        if not bool((keep[:, -1:] & (top_k > num_looked_at)).any()):
            return values.masked_fill(~keep, -torch.inf), token_ids
        num_looked_at = vocab_size


def _invert(probabilities: Tensor, numbers: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
    """Return for each row [R, K] the first index whose cumulative probability exceeds the row's number."""
    cumulative = probabilities.cumsum(-1)
    # The sum may end a rounding error below one: scale the number to it, so that a token of probability zero
    # is never picked.
    targets = torch.from_numpy(np.ascontiguousarray(numbers)).unsqueeze(1) * cumulative[:, -1:]
    picks = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    return picks.clamp_(max=probabilities.shape[-1] - 1)
