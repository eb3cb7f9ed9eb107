"""The inside of an encoder process's loop."""

from penstock.engine.encoding.messages import Encode, EncodedPicture, EncodedPictures, EncoderLoaded
from penstock.engine.encoding.source import Encoded, FeatureSource
from penstock.engine.messages import error_info
from penstock.errors import PenstockError
from penstock.protocol import Picture


class EncoderHost:
    """A ``worker.Host`` that encodes what it is handed, one message at a time."""

    def __init__(self, source: FeatureSource) -> None:
        """``source`` encodes while its caller waits."""
        self._source = source
        self._messages: list[list[tuple[int, Picture]]] = []

    @property
    def has_work(self) -> bool:
        """Whether something was handed over and not encoded."""
        return bool(self._messages)

    def loaded(self) -> EncoderLoaded:
        """Return the message that says pictures are taken."""
        return EncoderLoaded()

    def handle(self, message: Encode) -> None:
        """Take pictures in."""
        self._messages.append(message.work)

    def step(self) -> EncodedPictures:
        """Encode the pictures of one message."""
        before_s = self._source.counters.seconds
        self._source.submit(self._messages.pop(0))
        pictures = [_plain(one) for one in self._source.take()]
        return EncodedPictures(pictures, self._source.counters.seconds - before_s)


def _plain(encoded: Encoded) -> EncodedPicture:
    features = encoded.features
    if isinstance(features, PenstockError):
        return EncodedPicture(encoded.feature_id, error=error_info(features))
    return EncodedPicture(encoded.feature_id, features.tobytes())
