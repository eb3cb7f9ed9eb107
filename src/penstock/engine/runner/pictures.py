"""What pictures add to a step's tensors. T packed tokens, K of them placeholders, E hidden width."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from penstock.engine.encoding.source import FeatureRows
from penstock.engine.scheduler import ScheduledBatch
from penstock.models.config import VisionConfig
from penstock.models.vision import Inserted, RotaryPositions
from penstock.models.vision.visible import Extent, seen_both_ways, visible_tokens
from penstock.protocol import Picture


class ShownPictures:
    """The pictures of running sequences, for one model's way of reading them."""

    def __init__(self, features: Mapping[int, FeatureRows], vision: VisionConfig | None) -> None:
        """``features`` has those of all pictures that a batch shows, by id. No ``vision``: there are none."""
        self._features = features
        self._vision = vision
        self._has_three_axes = vision is not None and vision.has_three_axes
        self._positions: dict[int, RotaryPositions] = {}
        """By sequence, if there are three axes"""
        self._extents: dict[int, list[Extent]] = {}
        """By sequence: its tokens that see each other; nothing of those that have none"""

    def add(self, sequence_id: int, pictures: Sequence[Picture], num_prompt_tokens: int) -> None:
        """Take note of a sequence."""
        if self._has_three_axes:
            self._positions[sequence_id] = RotaryPositions(pictures)
        extents = seen_both_ways(self._vision, pictures, num_prompt_tokens)
        if extents:
            self._extents[sequence_id] = extents

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence."""
        self._positions.pop(sequence_id, None)
        self._extents.pop(sequence_id, None)

    def inserted(self, batch: ScheduledBatch) -> Inserted | None:
        """Return what takes the place of placeholders' embeddings."""
        if not batch.pictures:
            return None
        rows = torch.cat([torch.arange(shown.row, shown.row + shown.num_rows) for shown in batch.pictures])
        parts = [self._features[one.feature_id][one.first : one.first + one.num_rows] for one in batch.pictures]
        return Inserted(rows, torch.from_numpy(np.concatenate(parts)))

    def position_offsets(self, batch: ScheduledBatch) -> list[int] | None:
        """Return what each sequence's tokens add to their index, in a batch that shows no picture; None: nothing."""
        if not self._has_three_axes:
            return None
        offsets = [self._positions[sequence_id].offset(start, end) for sequence_id, start, end in _spans(batch)]
        assert None not in offsets, "nothing is shown"
        return offsets  # type: ignore[return-value]

    def positions(self, batch: ScheduledBatch) -> npt.NDArray[np.int64] | None:
        """Return the tokens' positions on three axes, [3, T]; None where there is one."""
        if not self._has_three_axes:
            return None
        parts = [self._positions[sequence_id].of(start, end) for sequence_id, start, end in _spans(batch)]
        return np.concatenate(parts, axis=1)

    def visible(self, batch: ScheduledBatch) -> npt.NDArray[np.int32] | None:
        """Return how many of its sequence's tokens each sees, [T]; None where that is those before it."""
        if not self._extents or all(start >= self._last_seen(one) for one, start, _ in _spans(batch)):
            return None
        parts = [visible_tokens(self._extents.get(one, ()), start, end) for one, start, end in _spans(batch)]
        return np.concatenate(parts)

    def _last_seen(self, sequence_id: int) -> int:
        """Return the position from which on no token of a sequence sees those behind it."""
        extents = self._extents.get(sequence_id)
        return extents[-1][1] if extents else 0


def _spans(batch: ScheduledBatch) -> Iterator[tuple[int, int, int]]:
    """Yield each sequence's id, and where its new tokens begin and end in it."""
    for sequence_id, num_new, end in zip(batch.sequence_ids, batch.query_lens, batch.context_lens, strict=True):
        yield sequence_id, end - num_new, end
