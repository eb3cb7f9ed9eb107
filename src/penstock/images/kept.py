"""What images became, for the next request that shows them: a conversation shows its images again in every turn."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from penstock.images.reading import Remark
from penstock.images.shown import Detail
from penstock.protocol import Picture


@dataclass(frozen=True, slots=True)
class Became:
    """What becomes of an image or a video, wherever it is shown."""

    text: str
    """What takes the marker's place in the prompt"""
    pictures: tuple[Picture, ...]
    remarks: tuple[Remark, ...]

    @property
    def num_bytes(self) -> int:
        """About what it takes."""
        return len(self.text) + sum(len(picture.pixels) for picture in self.pictures)


class KeptImages:
    """Holds a bounded number of bytes, and gives up what was least recently asked for. Used from several threads."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[bytes, Became] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, name: bytes) -> Became | None:
        """Return what was kept under ``name``."""
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                self._kept.move_to_end(name)
            return found

    def keep(self, name: bytes, became: Became) -> None:
        """Keep it, unless it is more than there is room for."""
        with self._lock:
            if name in self._kept or became.num_bytes > self._most_bytes:
                return
            self._kept[name] = became
            self._num_bytes += became.num_bytes
            while self._num_bytes > self._most_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._num_bytes -= oldest.num_bytes


def name_of(content: str | bytes, salt: str, detail: Detail, *, is_video: bool) -> bytes:
    """Return a name for what an image's file, or the URL that has it in it, becomes for those who have ``salt``."""
    digest = hashlib.blake2b(repr((salt, detail, is_video, type(content).__name__)).encode(), digest_size=32)
    digest.update(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return digest.digest()
