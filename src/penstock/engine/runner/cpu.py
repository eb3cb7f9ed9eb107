"""The CPU runner: integers to tensors, one forward, the sampler."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from penstock.engine.runner.base import StepResult
from penstock.engine.runner.pictures import ShownPictures
from penstock.engine.sampling import GrammarMasks, SampledToken, Sampler
from penstock.engine.scheduler import ScheduledBatch
from penstock.kernels import Replay
from penstock.kernels.copy_blocks.reference import copy_blocks
from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.pages import PagesAhead
from penstock.kernels.tensor import Tensor
from penstock.models.lora import Adapted, Adapter
from penstock.models.vision import Inserted
from penstock.protocol import Picture, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from llguidance import LLMatcher

_SCORED_AT_ONCE = 64
"""Rows of logits in memory while a prompt's log probabilities are taken; a step samples more than that."""
_UNDRAFTED = 8
"""Steps without guesses, after which the next is taken to have none either"""
_NO_LOGITS = np.empty((0, 0), dtype=np.float32)


class RunnableModel(Protocol):
    """The part of a decoder model that a runner uses. T packed tokens, R rows, E hidden width, V vocabulary."""

    def load_adapter(self, path: Path) -> Adapter:
        """Return the LoRA adapter in directory ``path``. Raises ``ModelUnreadable``."""

    def forward(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states of ``token_ids`` [T] int64, writing their keys and values: of ``rows`` [R]
        int64, which is [R, E], or of all, [T, E].
        """

    def replay(self, cache: list[KVBlocks], block_size: int) -> Replay | None:
        """Return a faster ``forward`` over ``cache``, for steps without adapters; None where there is none."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 from [R, E]."""


class CPURunner:
    """Runs a model on the processor. T packed tokens, S sequences, R sampled rows, P tokens per block."""

    def __init__(
        self,
        model: RunnableModel,
        cache: list[KVBlocks],
        sampler: Sampler,
        *,
        block_size: int,
        step_tokens: int,
        shown: ShownPictures | None = None,
    ) -> None:
        """``step_tokens``: the most a step may hold. ``shown``: what pictures add, if the model sees any."""
        self._model = model
        self._shown = shown or ShownPictures({}, None)
        self._cache = cache
        self._pages = PagesAhead(cache, step_blocks=-(-step_tokens // block_size))
        self._replay = model.replay(cache, block_size)
        self._num_undrafted = _UNDRAFTED
        self._sampler = sampler
        self._block_size = block_size
        self._masks = GrammarMasks()
        self._adapters: dict[int, Adapter] = {}
        """By sequence; those that run without are not in it"""

    def add(
        self,
        sequence_id: int,
        index: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        matcher: "LLMatcher | None" = None,
        adapter: object | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Prepare to sample for choice ``index`` of a request; see ``Runner.add``."""
        self._sampler.add(sequence_id, index, params, prompt_token_ids)
        if matcher is not None:
            self._masks.add(sequence_id, matcher)
        if adapter is not None:
            assert isinstance(adapter, Adapter), "adapters come from load_adapter"
            self._adapters[sequence_id] = adapter
        self._shown.add(sequence_id, pictures, len(prompt_token_ids))

    def load_adapter(self, path: Path) -> Adapter:
        """Return the LoRA adapter in directory ``path``."""
        return self._model.load_adapter(path)

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence."""
        if self._replay is not None:
            self._replay.stop()
        self._sampler.remove(sequence_id)
        self._masks.remove(sequence_id)
        self._adapters.pop(sequence_id, None)
        self._shown.remove(sequence_id)

    def num_possible(self, sequence_id: int, draft: Sequence[int]) -> int:
        """Return how many tokens of ``draft`` may follow; see ``Runner.num_possible``."""
        return self._masks.num_possible(sequence_id, draft)

    def matcher(self, sequence_id: int) -> "LLMatcher | None":
        """Return what holds a sequence to its grammar; see ``Runner.matcher``."""
        return self._masks.matcher(sequence_id)

    def commit(self, sequence_id: int, token_id: int) -> bool:
        """Take a sampled token into the sequence's history; see ``Runner.commit``."""
        self._sampler.commit(sequence_id, token_id)
        return self._masks.commit(sequence_id, token_id)

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute the batch; see ``Runner.execute``."""
        self._pages.begin_step(batch.block_tables)
        drawn = self._drawn(batch)
        if drawn is not None:
            return drawn
        if self._replay is not None:
            self._replay.stop()
        if batch.block_copies:
            copy_blocks(self._cache, batch.block_copies)
        # Grammars are followed while the model runs, on the core that it leaves free.
        pending = self._masks.begin(batch.sample_ids, batch.drafts)
        try:
            rows = batch.sample_rows
            # When all decode, every row is sampled, in order: nothing to pick out.
            picked = None if len(rows) == batch.num_tokens and rows == list(range(len(rows))) else rows
            scores: list[TokenLogprobs] = []
            pooled: list[npt.NDArray[np.float64]] = []
            if batch.score_rows or batch.pool_rows:
                logits, scores, pooled = self._from_states(batch, picked)
            else:
                logits = self._logits(batch, picked)
        finally:
            masks = self._masks.finish(pending)
        if not rows:
            return StepResult([], scores, pooled)
        return StepResult(self._sampler.sample(logits, batch.sample_ids, masks, batch.drafts), scores, pooled)

    def _drawn(self, batch: ScheduledBatch) -> StepResult | None:
        """Return the result of a step that only decodes, and draws from what the model says as it is; None for others.

        The next step may have begun then, if it looks as if it will be like this one.
        """
        self._num_undrafted = 0 if batch.drafts else self._num_undrafted + 1
        rows, num_sequences = batch.sample_rows, len(batch.sequence_ids)
        if self._replay is None or num_sequences != batch.num_tokens or rows != list(range(num_sequences)):
            return None
        if batch.drafts or batch.block_copies or batch.score_rows or batch.pool_rows or not self._is_replayable(batch):
            return None
        draws = self._sampler.plain_draws(batch.sample_ids)
        if draws is None:
            return None
        # A text of which some could be guessed is likely to be guessed at again.
        goes_on = self._num_undrafted > _UNDRAFTED and self._sampler.may_go_on(batch.sample_ids)
        tokens = self._replay.draw(
            batch.token_ids,
            batch.context_lens,
            batch.block_tables,
            batch.table_starts,
            self._shown.position_offsets(batch),
            draws,
            goes_on=goes_on,
        )
        if tokens is None:
            return None
        return StepResult([None if token_id < 0 else SampledToken(token_id) for token_id in tokens])

    def _from_states(
        self, batch: ScheduledBatch, rows: list[int] | None
    ) -> tuple[npt.NDArray[np.float32], list[TokenLogprobs], list[npt.NDArray[np.float64]]]:
        """Return what a batch wants of its hidden states: logits as ``_logits`` does, scores of prompts, and sums."""
        replayed = self._replayed(batch, None)
        if replayed is not None and rows == [] and not batch.score_rows:
            # Sums alone do without torch.
            return _NO_LOGITS, [], [replayed[first:last].sum(0, dtype=np.float64) for first, last in batch.pool_rows]
        with torch.inference_mode():
            hidden = self._forward(batch, None) if replayed is None else torch.from_numpy(replayed)
            scores = self._score(batch, hidden) if batch.score_rows else []
            pooled = [hidden[first:last].double().sum(0).numpy() for first, last in batch.pool_rows]
            if rows == []:
                return _NO_LOGITS, scores, pooled
            return self._model.logits(hidden if rows is None else hidden[torch.tensor(rows)]).numpy(), scores, pooled

    def _logits(self, batch: ScheduledBatch, rows: list[int] | None) -> npt.NDArray[np.float32]:
        """Return the logits [R, V] of ``rows``, or of all tokens, valid until the next step.

        Where no row is wanted, it is nothing that counts: the step is for its keys and values.
        """
        replayed = self._replayed(batch, rows, to_logits=rows != [])
        if replayed is not None:
            return replayed
        with torch.inference_mode():
            hidden = self._forward(batch, rows)
            if rows == []:
                return _NO_LOGITS
            logits: npt.NDArray[np.float32] = self._model.logits(hidden).numpy()
            return logits

    def _replayed(
        self, batch: ScheduledBatch, rows: list[int] | None, *, to_logits: bool = False
    ) -> npt.NDArray[np.float32] | None:
        """Return what a step that is like others gives; None, and nothing done, for one that is not."""
        if self._replay is None or not self._is_replayable(batch):
            return None
        return self._replay(
            batch.token_ids,
            batch.query_lens,
            batch.context_lens,
            batch.block_tables,
            batch.table_starts,
            self._shown.position_offsets(batch),
            rows,
            to_logits=to_logits,
        )

    def _is_replayable(self, batch: ScheduledBatch) -> bool:
        adapted = self._adapters and not self._adapters.keys().isdisjoint(batch.sequence_ids)
        return not adapted and not batch.pictures and self._shown.visible(batch) is None

    def _forward(self, batch: ScheduledBatch, rows: list[int] | None) -> Tensor:
        """Return the hidden states of ``rows`` [R, E], or of all tokens [T, E]."""
        layout = BatchLayout.pack(
            batch.query_lens,
            batch.context_lens,
            batch.block_tables,
            self._block_size,
            batch.table_starts,
            positions=self._shown.positions(batch),
            visible=self._shown.visible(batch),
        )
        return self._model.forward(
            torch.tensor(batch.token_ids, dtype=torch.int64),
            layout,
            self._cache,
            self._adapted(batch),
            self._shown.inserted(batch),
            None if rows is None else torch.tensor(rows, dtype=torch.int64),
        )

    def _adapted(self, batch: ScheduledBatch) -> Adapted:
        """Return which rows run with which adapter."""
        if not self._adapters:
            return ()
        rows: dict[Adapter, list[int]] = {}
        first = 0
        for sequence_id, length in zip(batch.sequence_ids, batch.query_lens, strict=True):
            adapter = self._adapters.get(sequence_id)
            if adapter is not None:
                rows.setdefault(adapter, []).extend(range(first, first + length))
            first += length
        return [(torch.tensor(places, dtype=torch.int64), adapter) for adapter, places in rows.items()]

    def _score(self, batch: ScheduledBatch, hidden: Tensor) -> list[TokenLogprobs]:
        """Return the log probabilities of the prompts' tokens, [C], a few rows at a time, for logits are large."""
        rows = torch.tensor(batch.score_rows, dtype=torch.int64)
        scores: list[TokenLogprobs] = []
        for start in range(0, len(rows), _SCORED_AT_ONCE):
            part = slice(start, start + _SCORED_AT_ONCE)
            owners = [batch.sequence_ids[s] for s in batch.score_owners[part]]
            logits = self._model.logits(hidden[rows[part]])
            scores.extend(self._sampler.score(logits.numpy(), batch.score_targets[part], owners))
        return scores
