"""The one value that scheduler and runner meet in."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.protocol import Picture


class PictureRows(NamedTuple):
    """Rows of a step that show a part of a picture: they take its features in place of their tokens' embeddings."""

    row: int
    """The first of the T tokens"""
    feature_id: int
    first: int
    """Which of the picture's features goes there"""
    num_rows: int


@dataclass(slots=True)
class ScheduledBatch:
    """One step's work: S sequences with T new tokens, one after another, R rows to sample, C to score and M to pool.

    Valid until the scheduler's next step: ``block_tables`` are the sequences' own.
    """

    sequence_ids: list[int] = field(default_factory=list)
    """[S]"""
    token_ids: list[int] = field(default_factory=list)
    """[T]"""
    query_lens: list[int] = field(default_factory=list)
    """[S] new tokens of each sequence"""
    context_lens: list[int] = field(default_factory=list)
    """[S] tokens in the cache once this step is done"""
    block_tables: "list[array[int]]" = field(default_factory=list)
    """[S]"""
    table_starts: list[int] = field(default_factory=list)
    """[S] position of the first token of each table's first block"""
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(from, to) blocks to copy before the step writes"""
    sample_rows: list[int] = field(default_factory=list)
    """[R] which of the T tokens' logits to sample; choices that split off share a row"""
    sample_ids: list[int] = field(default_factory=list)
    """[R] the sequence each sampled token goes to"""
    sample_owners: list[int] = field(default_factory=list)
    """[R] which of the S sequences computed the row"""
    score_rows: list[int] = field(default_factory=list)
    """[C] which of the T tokens' logits say how likely the prompt's next token was"""
    score_targets: list[int] = field(default_factory=list)
    """[C] that token"""
    score_owners: list[int] = field(default_factory=list)
    """[C] which of the S sequences computed the row"""
    pool_rows: list[tuple[int, int]] = field(default_factory=list)
    """[M] (first, after the last) of the T tokens whose hidden states are summed up"""
    pool_owners: list[int] = field(default_factory=list)
    """[M] which of the S sequences they belong to"""
    ended_ids: list[int] = field(default_factory=list)
    """Sequences that generate nothing, and whose prompt is done with this step"""
    drafts: dict[int, Sequence[int]] = field(default_factory=dict)
    """By sequence id: guesses at what follows its tokens, which are the last of its new tokens here. Where there are d
    of them, its last 1 + d rows are sampled."""
    encode: list[tuple[int, Picture]] = field(default_factory=list)
    """Pictures to encode, by the id that their features will have; before the step, if it is this process that does"""
    pictures: list[PictureRows] = field(default_factory=list)
    """By row"""
    picture_owners: list[int] = field(default_factory=list)
    """Which of the S sequences each belongs to"""

    @property
    def num_tokens(self) -> int:
        """T"""
        return len(self.token_ids)

    @property
    def num_drafted_tokens(self) -> int:
        """How many of the T are guesses."""
        return sum(map(len, self.drafts.values())) if self.drafts else 0

    def without_drafts(self) -> "ScheduledBatch":
        """Return the batch with nothing guessed."""
        return self._select(range(len(self.sequence_ids)), drafts={})

    def select(self, sequences: Iterable[int]) -> "ScheduledBatch":
        """Return the batch of only these of the S sequences, in the order given, with all block copies.

        Nothing is left to encode: that comes before a batch is cut.
        """
        return self._select(sequences, drafts=self.drafts)

    def _select(self, sequences: Iterable[int], *, drafts: dict[int, Sequence[int]]) -> "ScheduledBatch":
        starts = [0]
        for length in self.query_lens:
            starts.append(starts[-1] + length)
        part = ScheduledBatch(block_copies=self.block_copies)
        for s in sequences:
            offset = part.num_tokens - starts[s]
            sequence_id = self.sequence_ids[s]
            end, num_dropped = starts[s + 1], 0
            if sequence_id in drafts:
                part.drafts[sequence_id] = drafts[sequence_id]
            elif sequence_id in self.drafts:
                num_dropped = len(self.drafts[sequence_id])
                end -= num_dropped
            part.sequence_ids.append(sequence_id)
            part.token_ids.extend(self.token_ids[starts[s] : end])
            part.query_lens.append(self.query_lens[s] - num_dropped)
            part.context_lens.append(self.context_lens[s] - num_dropped)
            part.block_tables.append(self.block_tables[s])
            part.table_starts.append(self.table_starts[s])
            for row, sample_id, owner in zip(self.sample_rows, self.sample_ids, self.sample_owners, strict=True):
                if owner == s and row < end:
                    part.sample_rows.append(row + offset)
                    part.sample_ids.append(sample_id)
                    part.sample_owners.append(len(part.sequence_ids) - 1)
            for row, target, owner in zip(self.score_rows, self.score_targets, self.score_owners, strict=True):
                if owner == s:
                    part.score_rows.append(row + offset)
                    part.score_targets.append(target)
                    part.score_owners.append(len(part.sequence_ids) - 1)
            for (first, last), owner in zip(self.pool_rows, self.pool_owners, strict=True):
                if owner == s:
                    part.pool_rows.append((first + offset, last + offset))
                    part.pool_owners.append(len(part.sequence_ids) - 1)
            for shown, owner in zip(self.pictures, self.picture_owners, strict=True):
                if owner == s:
                    part.pictures.append(shown._replace(row=shown.row + offset))
                    part.picture_owners.append(len(part.sequence_ids) - 1)
            if self.sequence_ids[s] in self.ended_ids:
                part.ended_ids.append(self.sequence_ids[s])
        return part
