"""Guessing by a smaller model that shares the scheduler.

Its keys and values lie in blocks of the same ids as the target's, so scheduler, block tables and prefix cache know
nothing of it. It computes only what a guess needs: where nobody guesses it costs nothing, and what it has missed it
makes up for in portions when it is asked. It draws with the random numbers that the target will draw with, so that
under sampling too the two agree as often as their distributions do.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from penstock.engine.kv import BlockPool
from penstock.engine.request import Sequence
from penstock.engine.sampling import Sampler
from penstock.engine.speculative.drafter import Offer
from penstock.kernels import BatchLayout, KVBlocks
from penstock.kernels.pages import PagesAhead
from penstock.models.model import LanguageModel

_MOST_MISSED = 256
"""Tokens made up for at a time, which the step waits for"""


@dataclass(slots=True)
class _Progress:
    """What of a sequence is in the draft model's cache."""

    num_preemptions: int
    """Of the sequence, when this began: each takes its blocks away"""
    num_cached: int = 0
    """Tokens whose keys and values are there"""
    num_named: int = 0
    """Blocks noted as computed"""
    guess: list[int] = field(default_factory=list)
    """The tokens computed behind those, which may have come true"""


@dataclass(slots=True)
class _Work:
    """A sequence that is being computed."""

    sequence: Sequence
    draft: list[int]
    """Its guesses so far"""
    inputs: list[int]
    """Its tokens to compute, guesses among them"""
    end: int
    """Tokens it has with these"""
    most: int
    """Guesses wanted, none while it catches up"""


class DraftModel:
    """A ``Drafter``. S sequences, T packed tokens, P tokens per block."""

    def __init__(
        self,
        model: LanguageModel,
        sampler: Sampler,
        pool: BlockPool,
        *,
        block_size: int,
        reserve: Callable[[Sequence, int], bool],
    ) -> None:
        """``sampler`` is the target's. ``reserve`` gives a sequence blocks for so many guesses, if there is room."""
        self._model = model
        self._cache: list[KVBlocks] = model.new_cache(pool.num_blocks, block_size)
        self._pages = PagesAhead(self._cache, step_blocks=-(-_MOST_MISSED // block_size))
        self._replay = model.replay(self._cache, block_size)
        self._sampler = sampler
        self._pool = pool
        self._block_size = block_size
        self._reserve = reserve
        self._progress: dict[int, _Progress] = {}
        self._computed: list[bytes | None] = [None] * pool.num_blocks
        """By block: the name of the content that was computed for it, which other sequences may share"""

    def offer(self, sequence: Sequence, most: int) -> Offer | None:
        """Offer always, within the model's context; see ``Drafter.offer``."""
        fits = sequence.num_tokens + most <= self._model.config.max_positions
        return Offer(sequence, most) if fits else None

    def draft(self, chosen: SequenceOf[tuple[Offer, int]]) -> list[list[int]]:
        """Return what the model says; nothing of sequences that it has to catch up with first."""
        drafts: list[list[int]] = [[] for _ in chosen]
        working: list[_Work] = []
        budget = _MOST_MISSED
        for (offer, length), draft in zip(chosen, drafts, strict=True):
            sequence = offer.sequence
            if not budget or not self._reserve(sequence, length):
                continue
            progress = self._progress_of(sequence)
            start, end = progress.num_cached, min(sequence.num_tokens, progress.num_cached + budget)
            budget -= end - start
            progress.num_cached, progress.guess = end, draft
            for block in sequence.table.block_ids[start // self._block_size :]:
                self._computed[block] = None
            most = length if end == sequence.num_tokens else 0
            working.append(_Work(sequence, draft, sequence.token_ids[start:end], end, most))
        while working:
            self._guess(working)
            working = [work for work in working if len(work.draft) < work.most]
            for work in working:
                work.inputs = work.draft[-1:]
                work.end += 1
        return drafts

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence."""
        self._progress.pop(sequence_id, None)

    def _guess(self, working: list[_Work]) -> None:
        """Compute inputs and add what follows them to the drafts that still want it; ends those that get nothing."""
        query_lens = [len(work.inputs) for work in working]
        placement = (query_lens, [work.end for work in working], [work.sequence.table.block_ids for work in working])
        self._pages.begin_step(placement[2])
        token_ids = [token_id for work in working for token_id in work.inputs]
        guessing = [i for i, work in enumerate(working) if work.most]
        ends = list(accumulate(query_lens))
        rows = [ends[i] - 1 for i in guessing]
        logits = None
        if self._replay is not None:
            logits = self._replay(token_ids, *placement, [0] * len(working), rows=rows, to_logits=True)
        if logits is None:
            layout = BatchLayout.pack(*placement, self._block_size)
            with torch.inference_mode():
                places = torch.tensor(rows, dtype=torch.int64)
                hidden = self._model.forward(torch.tensor(token_ids), layout, self._cache, rows=places)
                logits = self._model.logits(hidden).numpy()
        if not guessing:
            return
        guesses = self._sampler.guess(
            logits,
            [working[i].sequence.id for i in guessing],
            [working[i].draft for i in guessing],
        )
        for i, guess in zip(guessing, guesses, strict=True):
            if guess is None:
                working[i].most = 0
            else:
                working[i].draft.append(guess)

    def _progress_of(self, sequence: Sequence) -> _Progress:
        """Return what is cached of a sequence's tokens: all that will be computed is behind it."""
        progress = self._progress.get(sequence.id)
        block_ids, size = sequence.table.block_ids, self._block_size
        if progress is None or progress.num_preemptions != len(sequence.preemptions):
            progress = self._progress[sequence.id] = _Progress(len(sequence.preemptions))
            for block in block_ids[: (sequence.num_tokens - 1) // size]:
                if self._computed[block] is None or self._computed[block] != self._pool.name(block):
                    break
                progress.num_named += 1
            progress.num_cached = progress.num_named * size
            return progress
        # The last guess was never computed with, and the last token is always computed again: what follows it is asked.
        for token_id in progress.guess[:-1]:
            if sequence.num_tokens - progress.num_cached <= 1 or sequence.token_ids[progress.num_cached] != token_id:
                break
            progress.num_cached += 1
        progress.num_cached = min(progress.num_cached, sequence.num_tokens - 1)
        for block in block_ids[progress.num_named : progress.num_cached // size]:
            self._computed[block] = self._pool.name(block)
            progress.num_named += 1
        return progress
