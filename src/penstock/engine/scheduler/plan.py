"""A step while it is put together: who is in it with how many tokens, and the batch that comes of it."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from penstock.engine.kv.manager import BlockCopy
from penstock.engine.request import Sequence
from penstock.engine.scheduler.batch import PictureRows, ScheduledBatch
from penstock.protocol import Picture


@dataclass(slots=True)
class Plan:
    """What the step being put together holds so far."""

    entries: dict[int, tuple[Sequence, int, list[BlockCopy]]] = field(default_factory=dict)
    """By sequence id: who, how many new tokens, which copies first"""
    drafts: dict[int, SequenceOf[int]] = field(default_factory=dict)
    """By sequence id: of those tokens, the last ones, which are guesses"""
    tokens_left: int = 0
    draft_tokens_left: int = 0
    """Of those, how many may be guesses"""
    has_preempted: bool = False
    """Blocks are short, so nobody else is let in"""

    def add(self, sequence: Sequence, num_new: int, copies: list[BlockCopy], draft: SequenceOf[int] = ()) -> None:
        """Take a sequence in with ``num_new`` tokens, the last of which are ``draft``."""
        self.entries[sequence.id] = (sequence, num_new, copies)
        self.tokens_left -= num_new
        if draft:
            self.drafts[sequence.id] = draft
            self.draft_tokens_left -= len(draft)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, if it is in, and give its tokens to others."""
        dropped = self.entries.pop(sequence.id, None)
        self.drafts.pop(sequence.id, None)
        if dropped is not None:
            self.tokens_left += dropped[1]

    def batch(self, block_size: int, encode: list[tuple[int, Picture]]) -> ScheduledBatch:
        """Return the step's work, ``encode`` included."""
        batch = ScheduledBatch(drafts=self.drafts, encode=encode)
        num_rows = 0
        for sequence, num_new, copies in self.entries.values():
            start = sequence.num_computed_tokens
            end = start + num_new
            table = sequence.table
            batch.sequence_ids.append(sequence.id)
            if num_new == 1:
                batch.token_ids.append(sequence.token_ids[start])
            else:
                batch.token_ids.extend(sequence.token_ids[start:end])
            draft = self.drafts.get(sequence.id, ())
            batch.token_ids.extend(draft)
            batch.query_lens.append(num_new)
            batch.context_lens.append(end)
            batch.block_tables.append(table.block_ids)
            batch.table_starts.append(table.num_dropped * block_size)
            batch.block_copies.extend(copies)
            if sequence.num_scored_tokens < sequence.num_to_score:
                _read_prompt(batch, sequence, start, end, num_rows)
            if not sequence.pictures.is_done:
                _show_pictures(batch, sequence, start, end, num_rows)
            num_rows += num_new
            if end == sequence.num_tokens and not sequence.request.sampling.max_tokens:
                batch.ended_ids.append(sequence.id)
            elif draft:
                batch.sample_rows.extend(range(num_rows - 1 - len(draft), num_rows))
                batch.sample_ids.extend([sequence.id] * (1 + len(draft)))
                batch.sample_owners.extend([len(batch.sequence_ids) - 1] * (1 + len(draft)))
            elif end == sequence.num_tokens:
                samples: SequenceOf[Sequence] = sequence.request.sequences if sequence.is_leader else (sequence,)
                for sampled in samples:
                    batch.sample_rows.append(num_rows - 1)
                    batch.sample_ids.append(sampled.id)
                    batch.sample_owners.append(len(batch.sequence_ids) - 1)
        return batch


def _read_prompt(batch: ScheduledBatch, sequence: Sequence, start: int, end: int, row: int) -> None:
    """Ask of the tokens from ``start`` to ``end``, the first of them in ``row``, what is wanted and not had yet."""
    owner = len(batch.sequence_ids) - 1
    first, last = max(start, sequence.num_scored_tokens), min(end, sequence.num_to_score)
    if sequence.request.pooling is None:
        for position in range(first, last):
            batch.score_rows.append(row + position - start)
            batch.score_targets.append(sequence.token_ids[position + 1])
            batch.score_owners.append(owner)
    elif first < last:
        batch.pool_rows.append((row + first - start, row + last - start))
        batch.pool_owners.append(owner)


def _show_pictures(batch: ScheduledBatch, sequence: Sequence, start: int, end: int, row: int) -> None:
    """Have the tokens from ``start`` to ``end``, the first of them in ``row``, show what they stand for."""
    cursor = sequence.pictures
    for picture, features in zip(cursor.pictures[cursor.num_passed :], cursor.held, strict=False):
        first, last = max(start, picture.offset), min(end, picture.offset + picture.num_tokens)
        if first < last:
            batch.pictures.append(PictureRows(row + first - start, features.id, first - picture.offset, last - first))
            batch.picture_owners.append(len(batch.sequence_ids) - 1)
