"""An encoder in this process."""

import time
from collections.abc import Callable, Sequence

import structlog
import torch
from torch import Tensor

from penstock.engine.encoding.source import Encoded, EncoderCounters, FeatureRows
from penstock.errors import EncodingFailed
from penstock.models.vision import VisionEncoder
from penstock.models.vision.layers import Parts
from penstock.protocol import Picture

_log = structlog.get_logger(__name__)


class LocalEncoder:
    """A ``FeatureSource`` that encodes while the caller waits, for a bounded time: one long picture over many calls."""

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
        self._long: tuple[int, Picture, Parts[list[Tensor]]] | None = None
        """What takes several steps, and how far that is"""

    @property
    def has_news(self) -> bool:
        """Whether something was encoded and not taken."""
        return bool(self._done)

    @property
    def is_behind(self) -> bool:
        """Whether a picture is encoded in part."""
        return self._long is not None

    def cost(self, picture: Picture) -> float:
        """See ``FeatureSource.cost``."""
        return 0.0 if self._step_work is None else self._encoder.work(picture) / self._step_work

    def cancel(self, feature_id: int) -> bool:
        """Stop with a picture that is encoded in part."""
        if self._long is None or self._long[0] != feature_id:
            return False
        self._long = None
        return True

    @torch.inference_mode()
    def submit(self, work: Sequence[tuple[int, Picture]]) -> None:
        """Encode all together; if that raises, one by one, so that each fails alone."""
        began_s = self._clock()
        short = [(feature_id, picture) for feature_id, picture in work if self.cost(picture) <= 1]
        for feature_id, picture in work:
            if self.cost(picture) > 1:
                assert self._long is None, "a picture of several steps is begun when nothing else is under way"
                self._long = (feature_id, picture, self._encoder.encoding([picture]))
        if short:
            try:
                self._finish(short, self._encoder.encode([picture for _, picture in short]))
            except Exception:  # whatever a picture can do to an encoder is its request's failure, never the engine's
                for one in short:
                    self._encode_alone(*one)
        elif self._long is not None:
            self._go_on(*self._long)
        self.counters.seconds += self._clock() - began_s

    def take(self) -> list[Encoded]:
        """Return what was encoded since."""
        done, self._done = self._done, []
        return done

    def on_news(self, wake: Callable[[], object]) -> None:
        """Never: there is news only after ``submit``."""

    def close(self) -> None:
        """Nothing has to be ended."""

    def _go_on(self, feature_id: int, picture: Picture, parts: Parts[list[Tensor]]) -> None:
        """Go a step's budget further with a picture."""
        assert self._step_work is not None, "without a budget no picture is long"
        num_done = 0
        try:
            while num_done < self._step_work:
                num_done += next(parts)
            return
        except StopIteration as end:
            self._finish([(feature_id, picture)], end.value)
        except Exception as error:
            self._fail(feature_id, picture, error)
        self._long = None

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
        for (feature_id, picture), tensor in zip(work, tensors, strict=True):
            assert len(tensor) == picture.num_tokens, "a row of features for each placeholder"
            # Exact, whatever dtype activations have. A part of a tensor would keep all of it alive.
            is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
            features: FeatureRows = tensor.to(torch.float32, copy=is_part).numpy()
            self._done.append(Encoded(feature_id, features))
        self.counters.num_pictures += len(work)
        self.counters.num_tokens += sum(picture.num_tokens for _, picture in work)
