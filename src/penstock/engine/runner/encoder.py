"""An encoder in this process."""

import time
from collections.abc import Callable, Sequence

import structlog
import torch

from penstock.engine.encoding.source import Encoded, EncoderCounters, FeatureRows
from penstock.errors import EncodingFailed
from penstock.models.vision import VisionEncoder
from penstock.protocol import Picture

_log = structlog.get_logger(__name__)


class LocalEncoder:
    """A ``FeatureSource`` that encodes what it is given while the caller waits."""

    def __init__(self, encoder: VisionEncoder, clock: Callable[[], float] = time.perf_counter) -> None:
        self.counters = EncoderCounters()
        self._encoder = encoder
        self._clock = clock
        self._done: list[Encoded] = []

    @property
    def has_news(self) -> bool:
        """Whether something was encoded and not taken."""
        return bool(self._done)

    def submit(self, work: Sequence[tuple[int, Picture]]) -> None:
        """Encode all together; if that raises, one by one, so that each fails alone."""
        began_s = self._clock()
        try:
            self._done += self._encode(work)
        except Exception:  # whatever a picture can do to an encoder is its request's failure, never the engine's
            self._done += [self._encode_alone(*one) for one in work]
        self.counters.seconds += self._clock() - began_s

    def take(self) -> list[Encoded]:
        """Return what was encoded since."""
        done, self._done = self._done, []
        return done

    def on_news(self, wake: Callable[[], object]) -> None:
        """Never: there is news only after ``submit``."""

    def close(self) -> None:
        """Nothing has to be ended."""

    def _encode_alone(self, feature_id: int, picture: Picture) -> Encoded:
        try:
            return self._encode([(feature_id, picture)])[0]
        except Exception as error:
            _log.exception("encoding_failed", shape=picture.shape, num_tokens=picture.num_tokens)
            failure = EncodingFailed(
                f"an image of this request could not be encoded: {type(error).__name__}: {error}; the server goes on, "
                "and its log has the details"
            )
            return Encoded(feature_id, failure)

    @torch.inference_mode()
    def _encode(self, work: Sequence[tuple[int, Picture]]) -> list[Encoded]:
        tensors = self._encoder.encode([picture for _, picture in work])
        done = []
        for (feature_id, picture), tensor in zip(work, tensors, strict=True):
            assert len(tensor) == picture.num_tokens, "a row of features for each placeholder"
            # Exact, whatever dtype activations have.
            # A copy, for a part of a tensor would keep all of it alive.
            features: FeatureRows = tensor.to(torch.float32, copy=True).numpy()
            done.append(Encoded(feature_id, features))
        self.counters.num_pictures += len(work)
        self.counters.num_tokens += sum(picture.num_tokens for _, picture in work)
        return done
