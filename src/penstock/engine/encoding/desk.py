"""The engine's side of seeing: pictures go out to be encoded, and what comes back is entered and handed on."""

from collections.abc import Callable, Sequence

from penstock.engine.encoding.features import FeatureCache
from penstock.engine.encoding.source import FeatureRows, FeatureSource
from penstock.errors import PenstockError
from penstock.protocol import Picture, SeeingStatus


class EncodingDesk:
    """Keeps what the scheduler knows of features and what the runner has of them the same."""

    def __init__(
        self, features: FeatureCache, source: FeatureSource | None, rows: dict[int, FeatureRows] | None = None
    ) -> None:
        """``rows`` are the runner's to read, by features' id. No ``source``: the model sees nothing."""
        self._features = features
        self._source = source
        self._rows = {} if rows is None else rows

    @property
    def is_awaiting(self) -> bool:
        """Whether pictures are being encoded elsewhere and none of them is done."""
        source = self._source
        return source is not None and self._features.is_awaiting and not source.has_news and not source.is_behind

    @property
    def is_behind(self) -> bool:
        """Whether ``submit``, of nothing too, would go on with a picture."""
        return self._source is not None and self._source.is_behind

    def on_news(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, on any thread, when ``is_awaiting`` may have become false."""
        if self._source is not None:
            self._source.on_news(wake)

    def close(self) -> None:
        """End encoders."""
        if self._source is not None:
            self._source.close()

    def submit(self, work: Sequence[tuple[int, Picture]]) -> None:
        """Have pictures encoded that the scheduler has made room for, or what this step can do of them."""
        assert self._source is not None, "only models that see take pictures"
        for feature_id in self._features.take_evicted():
            del self._rows[feature_id]
        self._source.submit(work)

    def collect(self) -> dict[int, PenstockError]:
        """Take in what was encoded, give up what nobody waits for; return by features' id what went wrong."""
        errors: dict[int, PenstockError] = {}
        if self._source is None:
            return errors
        for feature_id in self._features.unwanted():
            if self._source.cancel(feature_id):
                self._features.failed(feature_id)
        for feature_id, features in self._source.take():
            if isinstance(features, PenstockError):
                self._features.failed(feature_id)
                errors[feature_id] = features
            else:
                self._features.encoded(feature_id)
                self._rows[feature_id] = features
        return errors

    def status(self) -> SeeingStatus | None:
        """Return totals and the present state; None for a model that sees nothing."""
        if self._source is None:
            return None
        cache, encoder = self._features, self._source.counters
        return SeeingStatus(
            num_feature_queries=cache.counters.num_queries,
            num_feature_hits=cache.counters.num_hits,
            num_evicted_features=cache.counters.num_evicted,
            feature_bytes=cache.num_bytes,
            most_feature_bytes=cache.most_bytes,
            num_encoded_pictures=encoder.num_pictures,
            num_encoded_tokens=encoder.num_tokens,
            encode_s=encoder.seconds,
            num_workers=encoder.num_workers,
            num_ready_workers=encoder.num_ready_workers,
            num_worker_restarts=encoder.num_restarts,
        )
