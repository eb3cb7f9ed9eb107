"""What crosses the border between an engine and a process that encodes its pictures, as msgpack."""

import msgspec

from penstock.engine.messages import LoadFailed
from penstock.protocol import ErrorInfo, Picture


class Encode(msgspec.Struct, frozen=True, tag="encode"):
    """Engine to encoder: what to encode together."""

    work: list[tuple[int, Picture]]
    """By the id that features will have"""


class EncoderLoaded(msgspec.Struct, frozen=True, tag="encoder_loaded"):
    """Encoder to engine: pictures are taken from now on."""


class EncodedPicture(msgspec.Struct, frozen=True):
    """What became of one picture."""

    feature_id: int
    rows: bytes = b""
    """float32 [K, E] of its K placeholder tokens, in this machine's order of bytes"""
    error: ErrorInfo | None = None


class EncodedPictures(msgspec.Struct, frozen=True, tag="encoded"):
    """Encoder to engine: what became of all that it was given."""

    pictures: list[EncodedPicture]
    seconds: float


FromEncoder = EncoderLoaded | LoadFailed | EncodedPictures
