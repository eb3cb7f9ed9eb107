"""An encoder process over a tiny checkpoint, whose path is the payload: `python -m tests.encoder_worker ADDRESS`."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from penstock.engine.encoding.host import EncoderHost
from penstock.engine.encoding.messages import Encode, EncodedPictures
from penstock.engine.runner.encoder import LocalEncoder
from penstock.engine.worker import Host, run_host
from penstock.errors import ModelUnreadable
from penstock.models.vision import VisionEncoder
from penstock.models.vision.layers import Parts
from penstock.models.vision.load import load_vision
from penstock.protocol import Picture

DEADLY, DEADLY_ONCE, BROKEN, TORN = b"deadly", b"deadly once", b"broken", b"torn"
"""Keys of pictures that kill who encodes them, that cannot be encoded, or of whose features the last number is lost"""


class Mortal:
    """An encoder that some pictures are bad for; ``directory`` remembers across deaths."""

    num_parameters = 0
    patch_work = 0
    weights_bytes = 0

    def __init__(self, encoder: VisionEncoder, directory: Path) -> None:
        self._encoder = encoder
        self.work = encoder.work
        self._directory = directory

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        """Encode in parts."""
        return self._encoder.encoding(pictures)

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Encode, unless."""
        for picture in pictures:
            if picture.key == BROKEN:
                raise RuntimeError("a broken picture")
            if picture.key == DEADLY or (picture.key == DEADLY_ONCE and not (self._directory / "died").exists()):
                (self._directory / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self._encoder.encode(pictures)


class Tearing(EncoderHost):
    """A host that loses the last bytes of some pictures' features."""

    def step(self) -> EncodedPictures:
        """Encode the pictures of one message."""
        torn = {feature_id for feature_id, picture in self._messages[0] if picture.key == TORN}
        encoded = super().step()
        pictures = [
            msgspec.structs.replace(one, rows=one.rows[:-4]) if one.feature_id in torn else one
            for one in encoded.pictures
        ]
        return EncodedPictures(pictures, encoded.seconds)


if __name__ == "__main__":
    torch.set_num_threads(1)

    def build(payload: Future[bytes], wake: Callable[[], object]) -> Host:
        path = Path(payload.result().decode())
        encoder = load_vision(path, "float32") if path.is_dir() else None
        if encoder is None:
            raise ModelUnreadable(f"{path} is not there")
        return Tearing(LocalEncoder(Mortal(encoder, path)))

    sys.exit(run_host(sys.argv[1], msgspec.msgpack.Decoder(Encode), build))
