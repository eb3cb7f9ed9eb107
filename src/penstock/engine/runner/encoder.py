"""An encoder in this process."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.encoding.source import Encoded, EncoderCounters, FeatureRows
from penstock.errors import EncodingFailed
from penstock.models.vision import VisionEncoder
from penstock.models.vision.layers import Parts
from penstock.protocol import Picture
from penstock.telemetry import get_logger

_log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Begun:
    """A picture that takes several steps."""

    feature_id: int
    picture: Picture
    parts: Parts[list[Tensor]]
    work_left: int
    """About what is still to be done"""


class LocalEncoder:
    """A ``FeatureSource`` that encodes while the caller waits, for a bounded time: long pictures over many calls."""

    def __init__(
        self,
        encoder: VisionEncoder,
        *,
        step_patches: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``step_patches``: a step's budget, as much work as so many patches that see few others; None: no bound.

        It is kept to but for a part of a layer.
        """
        self.counters = EncoderCounters()
        self._encoder = encoder
        self._step_work = None if step_patches is None else max(1, step_patches * encoder.patch_work)
        self._clock = clock
        self._done: list[Encoded] = []
        self._begun: list[_Begun] = []
        """In order"""
        self._first_lead = 0
        """Work on the first of them, less that on others, since there are any"""

    @property
    def has_news(self) -> bool:
        """Whether something was encoded and not taken."""
        return bool(self._done)

    @property
    def is_behind(self) -> bool:
        """Whether a picture is encoded in part."""
        return bool(self._begun)

    def cost(self, picture: Picture) -> float:
        """See ``FeatureSource.cost``."""
        return 0.0 if self._step_work is None else self._encoder.work(picture) / self._step_work

    def cancel(self, feature_id: int) -> bool:
        """Stop with a picture that is encoded in part."""
        before = len(self._begun)
        self._begun = [one for one in self._begun if one.feature_id != feature_id]
        self._first_lead = 0
        return len(self._begun) < before

    @torch.inference_mode()
    def submit(self, work: Sequence[tuple[int, Picture]]) -> None:
        """Encode all short ones together; if that raises, one by one, so that each fails alone. Then go on."""
        began_s = self._clock()
        short, cost = [], 0.0
        for feature_id, picture in work:
            own = self.cost(picture)
            if own <= 1:
                short.append((feature_id, picture))
                cost += own
            else:
                parts = self._encoder.encoding([picture])
                self._begun.append(_Begun(feature_id, picture, parts, self._encoder.work(picture)))
        if short:
            try:
                self._finish(short, self._encoder.encode([picture for _, picture in short]))
            except Exception:  # whatever a picture can do to an encoder is its request's failure, never the engine's
                for one in short:
                    self._encode_alone(*one)
        if self._begun:
            self._go_on(cost)
        self.counters.seconds += self._clock() - began_s

    def take(self) -> list[Encoded]:
        """Return what was encoded since."""
        done, self._done = self._done, []
        return done

    def on_news(self, wake: Callable[[], object]) -> None:
        """Never: there is news only after ``submit``."""

    def close(self) -> None:
        """Nothing has to be ended."""

    def _go_on(self, cost: float) -> None:
        """Spend what a step's budget has left after ``cost`` on pictures that are begun.

        A half of it goes to the first, so that it does not wait for ever; the rest to whichever is done soonest.
        """
        assert self._step_work is not None, "without a budget no picture is long"
        budget, num_done = self._step_work * (1 - cost), 0
        while num_done < budget and self._begun:
            first, *others = self._begun
            if others and self._first_lead > 0:
                work = self._advance(min(others, key=lambda one: one.work_left))
                self._first_lead -= work
            else:
                work = self._advance(first)
                self._first_lead = self._first_lead + work if others and first in self._begun else 0
            num_done += work

    def _advance(self, begun: _Begun) -> int:
        """Go a part further with a picture and return how much work it was."""
        try:
            try:
                work = next(begun.parts)
                begun.work_left -= work
                return work
            except StopIteration as end:
                self._finish([(begun.feature_id, begun.picture)], end.value)
        except Exception as error:
            self._fail(begun.feature_id, begun.picture, error)
        self._begun.remove(begun)
        return 0

    def _encode_alone(self, feature_id: int, picture: Picture) -> None:
        try:
            self._finish([(feature_id, picture)], self._encoder.encode([picture]))
        except Exception as error:
            self._fail(feature_id, picture, error)

    def _fail(self, feature_id: int, picture: Picture, error: Exception) -> None:
        _log.error("encoding_failed", shape=picture.shape, num_tokens=picture.num_tokens, exc_info=error)
        failure = EncodingFailed(
            f"an image of this request could not be encoded: {type(error).__name__}: {error}; the server goes on, and "
            "its log has the details"
        )
        self._done.append(Encoded(feature_id, failure))

    def _finish(self, work: Sequence[tuple[int, Picture]], tensors: Sequence[Tensor]) -> None:
        """Enter the features of all pictures; of none if that raises."""
        self._done += [
            Encoded(feature_id, _rows(picture, tensor))
            for (feature_id, picture), tensor in zip(work, tensors, strict=True)
        ]
        self.counters.num_pictures += len(work)
        self.counters.num_tokens += sum(picture.num_tokens for _, picture in work)


def _rows(picture: Picture, tensor: Tensor) -> FeatureRows:
    assert len(tensor) == picture.num_tokens, "a row of features for each placeholder"
    # Exact, whatever dtype activations have. A part of a tensor would keep all of it alive.
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    rows: FeatureRows = tensor.to(torch.float32, copy=is_part).numpy()
    return rows
