"""Beam search: the likeliest continuations a bounded search finds, as transformers' ``generate`` finds them.

Each step every beam proposes its likeliest next tokens. Of all proposals the best go on, one for each beam; those among
the best that end are kept, ordered by their log probability over their length to the power of ``length_penalty``.
"""

from collections.abc import Collection
from dataclasses import dataclass

from penstock.engine.output import ChoiceOutput, OutputStep
from penstock.protocol import BeamParams, SamplingParams, TokenLogprobs


def num_proposed(sampling: SamplingParams, eos_token_ids: Collection[int]) -> int:
    """Return how many tokens a beam proposes: as many beams as there may be go on, even if all others' are ends."""
    assert sampling.beam is not None
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    return max(2, 1 + len(ends)) * sampling.beam.width


def proposing(sampling: SamplingParams, eos_token_ids: Collection[int]) -> SamplingParams:
    """Return what has the sampler give a beam's likeliest next tokens."""
    most = max(num_proposed(sampling, eos_token_ids), sampling.logprobs or 0)
    return SamplingParams(max_tokens=sampling.max_tokens, temperature=0.0, logprobs=most)


@dataclass(slots=True, frozen=True, eq=False)
class Beam:
    """A continuation: the one before it, and a token more."""

    parent: "Beam | None"
    score: float
    """Its tokens' log probabilities, summed up"""
    output: ChoiceOutput
    """Has taken its tokens"""
    step: OutputStep
    """What the last token did"""
    token: TokenLogprobs | None = None
    """None: nothing has been generated"""

    def path(self) -> "list[Beam]":
        """Return the beams from the first token to this one."""
        beams = []
        beam = self
        while beam.parent is not None:
            beams.append(beam)
            beam = beam.parent
        return beams[::-1]


class BeamSearch:
    """One search, from its prompt on."""

    def __init__(self, beam: BeamParams, sampling: SamplingParams, output: ChoiceOutput) -> None:
        """``output`` has taken no token yet."""
        self._params = beam
        self._sampling = sampling
        self._beams = [Beam(None, 0.0, output, OutputStep(""))]
        self._num_steps = 0
        self.finished: list[tuple[float, Beam]] = []
        """As many as there may be beams at most, best first; complete once ``advance`` returns nothing."""

    def advance(self, proposals: list[TokenLogprobs], num_proposed: int) -> list[tuple[int, int]]:
        """Go a token further: ``proposals`` are each beam's likeliest tokens, ``num_proposed`` of which count.

        Returns the beams that go on, as (which of the beams so far, its next token), in the order in which they are
        numbered from now on; one for every beam there may be, by repetition if need be. Nothing: the search is over.
        """
        width = self._params.width
        self._num_steps += 1
        found = [
            (beam.score + candidate.logprob, place, candidate)
            for place, (beam, proposed) in enumerate(zip(self._beams, proposals, strict=False))
            for candidate in proposed.top[:num_proposed]
        ]
        found.sort(key=lambda one: -one[0])
        steps: list[tuple[int, int]] = []
        beams: list[Beam] = []
        ended: list[Beam] = []
        for rank, (score, place, candidate) in enumerate(found[:num_proposed]):
            if rank >= width and len(beams) == width:
                break
            parent = self._beams[place]
            output = parent.output.copy()
            step = output.push(candidate.token_id)
            token = TokenLogprobs(candidate, proposals[place].top[: self._sampling.logprobs or 0])
            beam = Beam(parent, score, output, step, token)
            if step.finish_reason is None:
                if len(beams) < width:
                    beams.append(beam)
                    steps.append((place, candidate.token_id))
            elif rank < width:
                # What ends further down the list was no rival to what goes on.
                ended.append(beam)
        self._beams = beams
        self._keep(ended)
        if self._is_over():
            return []
        return steps + steps[:1] * (width - len(steps))

    def _keep(self, ended: list[Beam]) -> None:
        penalty = self._num_steps**self._params.length_penalty
        self.finished += [(beam.score / penalty, beam) for beam in ended]
        self.finished.sort(key=lambda one: -one[0])
        del self.finished[self._params.width :]

    def _is_over(self) -> bool:
        """Whether nothing goes on, or nothing that could is expected to beat what has ended."""
        params = self._params
        if not self._beams:
            return True
        if len(self.finished) < params.width:
            return False
        if params.early_stopping is True:
            return True
        # The best beam's score is taken at its length now, or, where all are to be looked at, at the kindest one.
        is_thorough = params.early_stopping == "never" and params.length_penalty > 0
        length = self._sampling.max_tokens if is_thorough else self._num_steps
        best: float = self._beams[0].score / length**params.length_penalty
        return best <= self.finished[-1][0]
