"""Bytes that strangers send become RGB images, or a reason why they cannot."""

import contextlib
import io
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Transpose
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from penstock.errors import InvalidImage, PenstockError

SMALLEST_SIDE = 8
"""Pixels. An image that is narrower is half a patch of any encoder: whatever it showed is lost."""
SMALL_SIDE = 32
"""Pixels. Less than this is seen as two patches or so."""
LONGEST_RATIO = 200
"""Of the longer side to the shorter; families that keep the ratio take no more."""
_MOST_SCANS = 64
"""Of a JPEG. A progressive one has about ten; a dozen bytes can be one, and each costs a pass over all pixels."""
_FRAME_MS = 100.0
"""How long a frame is shown whose file does not say."""
_LEAST_NOISE_BYTES = 8
"""That no row of an image is by chance."""
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation"""

# A stranger chooses what Pillow warns of: it would fill the log, and the memory of what was warned of already.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Named themselves rather than found by Image.open, which would try every format there is and decide by its own limit of
# pixels whether to warn, to raise or to go on.
_READ: dict[str, type[ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
}
_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "MP4"),
    (0, b"\x1aE\xdf\xa3", "WebM"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"<", "SVG or HTML"),
)
"""Where in a file, what is there, and what it is then"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What reading one image or video may cost."""

    max_pixels: int
    """Of all frames"""
    max_frames: int
    timeout_s: float
    """Checked whenever a decoder asks for more of the file, so that one cannot go on for much longer."""


@dataclass(frozen=True, slots=True)
class Remark:
    """What is wrong with an image that can be shown all the same."""

    code: str
    """``image_blank`` or ``image_small``"""
    message: str


@dataclass(frozen=True, slots=True)
class Frames:
    """A video as still images of one size."""

    images: list[Image.Image]
    frames_per_s: float


class _TooSlow(Exception):
    """The time for an image is over."""


class _UntilDeadline(io.BytesIO):
    """A file that can be read for a while."""

    def __init__(self, data: bytes, timeout_s: float) -> None:
        super().__init__(data)
        self._deadline_s = time.monotonic() + timeout_s

    def read(self, size: int | None = -1, /) -> bytes:
        """Read on. Raises ``_TooSlow`` when the time is over."""
        if time.monotonic() > self._deadline_s:
            raise _TooSlow
        return super().read(size)


def read_image(data: bytes, limits: Limits) -> Image.Image:
    """Return an image file's picture, or an animation's first, as it is meant to be looked at.

    Upright as EXIF says, transparent parts white, 8 bits a channel. Blocks for as long as decoding takes.
    Raises ``InvalidImage`` with the reason and the remedy, whatever ``data`` holds.
    """
    with _decoding(data, limits), _opened(data, limits) as source:
        return _upright(source)


def read_frames(data: bytes, limits: Limits) -> Frames:
    """Return the frames of an animated GIF, WebP or PNG, each as ``read_image`` would. Blocks and raises as that."""
    images: list[Image.Image] = []
    shown_ms = 0.0
    with _decoding(data, limits), _opened(data, limits) as source:
        while _seeks(source, len(images)):
            if len(images) == limits.max_frames:
                raise InvalidImage(f"it has more than the {limits.max_frames} frames this server reads; send fewer")
            _check_size(source, len(images) + 1, limits)
            images.append(_upright(source))
            shown_ms += float(source.info.get("duration") or _FRAME_MS)
    check_sizes(images)
    return Frames(images, 1000 * len(images) / shown_ms)


def check_sizes(images: list[Image.Image]) -> None:
    """Raise ``InvalidImage`` unless frames are of one size."""
    for index, image in enumerate(images):
        if image.size != images[0].size:
            raise InvalidImage(
                f"frame {index + 1} of {len(images)} is {_shown(image.size)} and the first is "
                f"{_shown(images[0].size)}: make them one size"
            )


def remarks_on(image: Image.Image) -> tuple[Remark, ...]:
    """Return what may be wrong with an RGB image that can be read."""
    remarks = []
    extrema = image.getextrema()
    if all(low == high for low, high in extrema):  # type: ignore[misc]  # pairs, of an image with several channels
        colour = "".join(f"{low:02x}" for low, _ in extrema)  # type: ignore[misc]
        remarks.append(Remark("image_blank", f"every pixel of it is #{colour}: there is nothing to see"))
    if min(image.size) < SMALL_SIDE:
        size = _shown(image.size)
        remarks.append(Remark("image_small", f"it is {size} pixels: little can be made out; send a larger one"))
    return tuple(remarks)


@contextlib.contextmanager
def _decoding(data: bytes, limits: Limits) -> Iterator[None]:
    try:
        yield
    except _TooSlow:
        raise InvalidImage(
            f"it is not decoded after the {limits.timeout_s:g} s this server takes for one; send a smaller one"
        ) from None
    except PenstockError:
        raise
    except Exception as error:  # decoders raise what they like, in words about their own insides
        kind = _kind(data)
        if _is_cut(data, kind):
            why = f"it is a {kind} that is cut off after {len(data)} bytes; send the whole file"
        else:
            why = f"it is a damaged {kind}: its end is there, what comes before cannot be decoded; make the file anew"
        raise InvalidImage(why) from error


def _is_cut(data: bytes, kind: str) -> bool:
    """Tell whether the end of a file is missing that begins as ``kind`` does."""
    last = data.rstrip(b"\0")[-16:]
    match kind:
        case "PNG":
            return b"IEND" not in last
        case "JPEG":
            return b"\xff\xd9" not in last
        case "GIF":
            return not last.endswith(b";")
        case _:
            return len(data) < 8 + int.from_bytes(data[4:8], "little")  # of WebP, what follows RIFF's size


@contextlib.contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[ImageFile]:
    """Open a file whose header and checksums are right; nothing of it is decoded."""
    kind = _kind(data)
    if not data:
        raise InvalidImage("it is empty; send the file's bytes")
    if kind not in _READ:
        remedy = "take frames from it first" if kind in ("MP4", "WebM") else "convert it to one of them"
        raise InvalidImage(f"it is {kind}; this server reads {', '.join(_READ)}: {remedy}")
    if kind == "JPEG" and (num_scans := data.count(b"\xff\xda")) > _MOST_SCANS:
        raise InvalidImage(f"it is a JPEG of {num_scans} scans, and at most {_MOST_SCANS} are read; save it anew")
    file = _UntilDeadline(data, limits.timeout_s)
    with _READ[kind](file) as source:
        _check_size(source, 1, limits)
        if kind != "PNG":
            yield source
            return
        # Decoding looks at no checksum of what it decodes, and makes another picture of damaged bytes.
        source.verify()
    file.seek(0)
    with PngImageFile(file) as source:
        yield source


def _kind(data: bytes) -> str:
    return next((kind for offset, magic, kind in _MAGIC if data.startswith(magic, offset)), "no image that is known")


def _check_size(source: ImageFile, num_frames: int, limits: Limits) -> None:
    """Judge an image by what its header says, before anything is decoded."""
    width, height = source.size
    if width * height * num_frames > limits.max_pixels:
        whole = _shown(source.size) if num_frames == 1 else f"{num_frames} frames of {_shown(source.size)} or more"
        raise InvalidImage(f"it is {whole}, and at most {limits.max_pixels} pixels are read; make it smaller")
    if min(width, height) < SMALLEST_SIDE:
        raise InvalidImage(
            f"it is {_shown(source.size)} pixels: with a side of less than {SMALLEST_SIDE} nothing can be seen in it; "
            "send a larger one"
        )
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise InvalidImage(
            f"it is {_shown(source.size)} pixels, and no side may be more than {LONGEST_RATIO} times the other; crop it"
        )


def _seeks(source: ImageFile, index: int) -> bool:
    """Go to a frame, if there is one of that number."""
    try:
        source.seek(index)
    except EOFError:
        return False
    return True


def _upright(source: ImageFile) -> Image.Image:
    """Decode the current frame."""
    if isinstance(source, PngImageFile) and source.tell() == 0:
        _load_whole(source)
    source.load()
    turn = _UPRIGHT.get(_orientation(source))
    image: Image.Image = source
    if image.mode == "I;16":
        # Pillow's conversion would clip instead.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    # A copy, for a source's frames share their pixels.
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    return image if turn is None else image.transpose(turn)


def _load_whole(source: PngImageFile) -> None:
    """Decode a PNG's picture. Raises ``InvalidImage`` where its data end before its last row.

    The decoder leaves such rows as they were, so that noise is still there. Interlaced, the last odd row comes last.
    """
    width, height = source.size
    last_rows = (0, height - 2, width, height)
    row_bytes = len(Image.new(source.mode, (width, 1)).tobytes())
    if row_bytes < _LEAST_NOISE_BYTES:
        return
    noise = os.urandom(2 * row_bytes)
    source.im = Image.new(source.mode, source.size).im
    source.im.paste(Image.frombytes(source.mode, (width, 2), noise).im, last_rows)
    source.load()
    rows = source.crop(last_rows).tobytes()
    if rows[:row_bytes] == noise[:row_bytes] or rows[row_bytes:] == noise[row_bytes:]:
        raise InvalidImage("it is a damaged PNG: its data hold fewer rows than its header says; make the file anew")


def _orientation(source: ImageFile) -> int:
    """Return what EXIF says; what cannot be read says nothing, as viewers take it."""
    try:
        value = source.getexif().get(_EXIF_ORIENTATION)
    except _TooSlow:
        raise
    except Exception:  # the parser raises what it likes
        return 1
    return value if isinstance(value, int) else 1


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
