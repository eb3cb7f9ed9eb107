"""Image files of every kind, whole, odd, broken and hostile."""

import contextlib
import io
import re
import resource
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from penstock.errors import InvalidImage
from penstock.images.data_url import decode_base64, split_data_url
from penstock.images.reading import Limits, read_frames, read_image, remarks_on
from tests.images.files import animated, data_url, drawing, encoded, png_chunk, png_of_size, png_without_rows

# As the server has it.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

LIMITS = Limits(max_pixels=1_000_000, max_frames=8, timeout_s=5.0)
KINDS = {
    "png": encoded(drawing()),
    "jpeg": encoded(drawing(), "JPEG", quality=90),
    "progressive": encoded(drawing(), "JPEG", progressive=True),
    "webp": encoded(drawing(), "WEBP", lossless=True),
    "gif": encoded(drawing(mode="P"), "GIF"),
    "apng": animated("PNG", ["red", "green", "blue"]),
    "animated gif": animated("GIF", ["red", "green", "blue"]),
    "animated webp": animated("WEBP", ["red", "green", "blue"]),
}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def reason(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(InvalidImage) as refused:
        read_image(data, limits)
    return refused.value.message


@pytest.mark.parametrize("kind", ["png", "jpeg", "progressive", "webp", "gif"])
def test_what_was_drawn_is_read(kind: str) -> None:
    image = read_image(KINDS[kind], LIMITS)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    expected = drawing(mode="P").convert("RGB") if kind == "gif" else drawing()
    difference = np.abs(pixels(image) - pixels(expected))
    assert difference.mean() < 6 if kind in ("jpeg", "progressive") else difference.max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = drawing().convert("L")
    if mode == "I;16":
        deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        data, expected = encoded(deep), grey.convert("RGB")
    elif mode == "CMYK":
        data, expected = encoded(drawing(mode="CMYK"), "JPEG", quality=100, subsampling=0), drawing()
    else:
        data, expected = encoded(drawing(mode=mode)), drawing(mode=mode).convert("RGB")
    image = read_image(data, LIMITS)
    assert image.mode == "RGB"
    assert np.abs(pixels(image) - pixels(expected)).max() <= (0 if mode != "CMYK" else 40)


def test_what_is_transparent_is_white() -> None:
    half = drawing(mode="RGBA")
    half.putalpha(Image.new("L", half.size, 128))
    shown = pixels(read_image(encoded(half), LIMITS))
    assert np.abs(shown - (pixels(drawing()) * 128 + 255 * 127) / 255).max() <= 1
    indexed = Image.new("P", (16, 16), 0)
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    indexed.paste(1, (0, 0, 8, 16))
    for kind in ("PNG", "GIF"):
        shown = pixels(read_image(encoded(indexed, kind, transparency=0), LIMITS))
        assert shown[0, 0].tolist() == [0, 0, 255]
        assert shown[0, 15].tolist() == [255, 255, 255]
    keyed = encoded(Image.new("RGB", (16, 16), (9, 9, 9)), "PNG", transparency=(9, 9, 9))
    assert pixels(read_image(keyed, LIMITS)).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = (
        drawing().transpose(
            {
                2: Image.Transpose.FLIP_LEFT_RIGHT,
                3: Image.Transpose.ROTATE_180,
                4: Image.Transpose.FLIP_TOP_BOTTOM,
                5: Image.Transpose.TRANSPOSE,
                6: Image.Transpose.ROTATE_90,
                7: Image.Transpose.TRANSVERSE,
                8: Image.Transpose.ROTATE_270,
            }[orientation]
        )
        if orientation > 1
        else drawing()
    )
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    image = read_image(encoded(turned, kind, exif=exif, **options), LIMITS)
    assert image.size == (64, 48)
    assert np.abs(pixels(image) - pixels(drawing())).mean() < 4


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40]
)
def test_exif_that_cannot_be_read_says_nothing(exif: bytes) -> None:
    data = KINDS["jpeg"]
    spoiled = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert read_image(spoiled, LIMITS).size == (64, 48)


def test_animations_show_their_first_frame() -> None:
    for kind in ("apng", "animated gif", "animated webp"):
        assert read_image(KINDS[kind], LIMITS).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"hello", "no image that is known"),
        (b"BM" + b"\0" * 60, "BMP"),
        (encoded(drawing(), "TIFF"), "TIFF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypavif", "AVIF"),
        (b"%PDF-1.7", "PDF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG or HTML"),
        (b"<!DOCTYPE html>", "SVG or HTML"),
    ],
)
def test_other_kinds_are_refused_by_name(data: bytes, kind: str) -> None:
    message = reason(data)
    assert f"it is {kind};" in message
    assert "PNG, JPEG, WebP, GIF: convert it" in message


def test_remedies_fit_what_was_sent() -> None:
    assert reason(b"") == "it is empty; send the file's bytes"
    for data, kind in ((b"\0\0\0\x18ftypisom", "MP4"), (b"\x1aE\xdf\xa3", "WebM")):
        assert reason(data) == f"it is {kind}; this server reads PNG, JPEG, WebP, GIF: take frames from it first"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("num_rows", [1, 30])
def test_a_png_that_lacks_rows_is_refused(mode: str, num_rows: int) -> None:
    image = drawing().convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    assert read_image(png_without_rows(image, 0), LIMITS).size == (64, 48)
    assert "its data hold fewer rows than its header says" in reason(png_without_rows(image, num_rows))
    black = Image.new(image.mode, image.size)
    assert read_image(encoded(black), LIMITS).size == (64, 48)


@pytest.mark.parametrize("height", [8, 9])
def test_an_interlaced_png_that_lacks_rows_is_refused(height: int) -> None:
    # Pillow writes none: of 8 pixels a row, the passes have so many rows of so many bytes.
    rows = [(1, -(-height // 8)), (1, -(-height // 8)), (2, -(-max(height - 4, 0) // 8)), (2, -(-height // 4))]
    rows += [(4, -(-max(height - 2, 0) // 4)), (4, -(-height // 2)), (8, height // 2)]
    raw = b"".join((b"\0" + bytes(range(width))) * count for width, count in rows)

    def interlaced(data: bytes) -> bytes:
        header = struct.pack(">IIBBBBB", 8, height, 8, 0, 0, 0, 1)
        return (
            b"\x89PNG\r\n\x1a\n"
            + png_chunk(b"IHDR", header)
            + png_chunk(b"IDAT", zlib.compress(data))
            + png_chunk(b"IEND", b"")
        )

    assert read_image(interlaced(raw), LIMITS).size == (8, height)
    assert "its data hold fewer rows than its header says" in reason(interlaced(raw[:-9]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_what_is_cut_off_is_refused(kind: str, share: float) -> None:
    data = KINDS[kind]
    cut = data[: max(12, int(len(data) * share))]
    if kind == "animated gif" and share >= 0.5:
        assert read_image(cut, LIMITS).getpixel((3, 3)) == (255, 0, 0)  # the first frame is whole
    else:
        assert re.search(rf"it is a \w+ that is cut off after {len(cut)} bytes; send the whole file", reason(cut))


@pytest.mark.parametrize("kind", ["png", "jpeg", "progressive", "webp", "gif", "apng", "animated webp"])
def test_what_is_damaged_is_told_from_what_is_cut_off(kind: str) -> None:
    data = bytearray(KINDS[kind])
    # The size of a JPEG; its other pixels would be another picture.
    damaged = 160 if data.startswith(b"\xff\xd8") else len(data) // 2
    data[damaged : damaged + 40] = bytes(40)
    assert re.search(r"it is a damaged \w+: its end is there", reason(bytes(data)))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), "it is 1x1 pixels: with a side of less than 8"),
        ((7, 400), "it is 7x400 pixels: with a side of less than 8"),
        ((8, 1601), "no side may be more than 200 times the other"),
        ((1001, 1000), "it is 1001x1000, and at most 1000000 pixels are read"),
    ],
)
def test_sizes_of_which_nothing_can_be_made(size: tuple[int, int], message: str) -> None:
    assert message in reason(encoded(Image.new("RGB", size)))


def test_sizes_at_the_limits() -> None:
    for size in ((8, 8), (8, 1600), (1000, 1000)):
        assert read_image(encoded(Image.new("RGB", size)), LIMITS).size == size


def test_remarks() -> None:
    assert remarks_on(drawing()) == ()
    (blank,) = remarks_on(Image.new("RGB", (64, 64), (1, 2, 255)))
    assert (blank.code, "#0102ff" in blank.message) == ("image_blank", True)
    (small,) = remarks_on(drawing(31, 64))
    assert (small.code, "31x64" in small.message) == ("image_small", True)
    assert {one.code for one in remarks_on(Image.new("RGB", (8, 8)))} == {"image_blank", "image_small"}


def huge_files() -> dict[str, bytes]:
    jpeg, webp, gif = bytearray(KINDS["jpeg"]), bytearray(KINDS["webp"]), bytearray(KINDS["gif"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    webp[21:25] = b"\xff\xff\xff\x0f"
    gif[6:10] = b"\xff\xff\xff\xff"
    extended = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\0" * 2
    return {
        "png": png_of_size(2**31 - 1, 2**31 - 1),
        "png wide": png_of_size(100_000, 10_000),
        "jpeg": bytes(jpeg),
        "webp": bytes(webp),
        "webp extended": extended,
        "gif": bytes(gif),
    }


@pytest.mark.parametrize("kind", huge_files())
def test_headers_that_promise_more_than_there_is_cost_nothing(kind: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.process_time()
    reason(huge_files()[kind])
    assert time.process_time() - began_s < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    data = zlib.compress(b"\0" * (3 * 20_000 * 20_000 // 64), 9)
    bomb = png_of_size(20_000, 20_000)
    bomb = bomb.replace(zlib.compress(b"\0" * 100), data)
    assert "at most 1000000 pixels" in reason(bomb)


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = KINDS["progressive"]
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    began_s = time.process_time()
    assert "1009 scans" in reason(data[:-2] + scan * 999 + data[-2:])
    assert time.process_time() - began_s < 1


@pytest.mark.parametrize("kind", ["png", "apng"])
def test_every_byte_of_a_png_counts(kind: str) -> None:
    data = KINDS[kind]
    # Before the last chunk, which has nothing in it.
    for place in range(8, len(data) - 12):
        spoiled = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        with pytest.raises(InvalidImage):
            read_image(spoiled, LIMITS)


def test_a_file_of_a_million_chunks_ends_in_time() -> None:
    data = KINDS["png"]
    chunk = struct.pack(">I", 0) + b"zzZz" + struct.pack(">I", zlib.crc32(b"zzZz"))
    stuffed = data[:33] + chunk * 1_000_000 + data[33:]
    began_s = time.perf_counter()
    message = reason(stuffed, Limits(max_pixels=1_000_000, max_frames=1, timeout_s=0.2))
    assert "not decoded after the 0.2 s" in message
    assert time.perf_counter() - began_s < 2


def readable(data: bytes) -> None:
    """Read what may be anything: it is an image or it is refused, soon."""
    began_s = time.process_time()
    for read in (read_image, read_frames):
        with contextlib.suppress(InvalidImage):
            read(data, LIMITS)
    assert time.process_time() - began_s < 5


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@FUZZ
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_spoiled_bytes_are_read_or_refused(kind: str, data: st.DataObject) -> None:
    spoiled = bytearray(KINDS[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        # Headers are where it hurts.
        place = data.draw(st.integers(0, min(len(spoiled), 80) - 1) | st.integers(0, len(spoiled) - 1))
        spoiled[place] = data.draw(st.integers(0, 255))
    readable(bytes(spoiled))


@FUZZ
@given(st.sampled_from(sorted(KINDS)), st.floats(0, 1), st.binary(max_size=64))
def test_cut_and_continued_bytes_are_read_or_refused(kind: str, share: float, tail: bytes) -> None:
    data = KINDS[kind]
    readable(data[: int(len(data) * share)] + tail)


@FUZZ
@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"GIF89a", b""]),
    st.binary(max_size=300),
)
def test_any_bytes_are_read_or_refused(magic: bytes, tail: bytes) -> None:
    readable(magic + tail)


def test_refusing_leaves_no_memory_behind() -> None:
    spoiled = [data[: len(data) // 2] for data in KINDS.values()] + list(huge_files().values())

    def once() -> None:
        for data in spoiled:
            readable(data)

    for _ in range(20):
        once()
    before = _resident_kib()
    for _ in range(200):
        once()
    assert _resident_kib() - before < 16 * 1024


def _resident_kib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_videos(kind: str) -> None:
    frames = read_frames(animated(kind, ["red", "lime", "blue", "black"], duration_ms=500), LIMITS)
    colours = [image.getpixel((5, 5)) for image in frames.images]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]
    assert frames.frames_per_s == pytest.approx(2.0)


def test_how_long_frames_are_shown_says_their_rate() -> None:
    for kind in ("PNG", "GIF", "WEBP"):
        assert read_frames(animated(kind, ["red", "lime"], duration_ms=40), LIMITS).frames_per_s == pytest.approx(25)
    assert read_frames(KINDS["png"], LIMITS).frames_per_s == pytest.approx(10)


def test_videos_are_bounded() -> None:
    colours = ["red", "lime", "blue", "black", "red", "lime", "blue", "white"]
    with pytest.raises(InvalidImage, match="more than the 8 frames"):
        read_frames(animated("GIF", [*colours, "red"]), LIMITS)
    with pytest.raises(InvalidImage, match="3 frames of 32x24 or more, and at most 2000 pixels"):
        read_frames(animated("GIF", colours), Limits(max_pixels=2000, max_frames=8, timeout_s=5))


@example("data:image/png,xyz")
@example("image/png ; BASE64 ,AAAA")
@given(st.text(max_size=60))
def test_data_urls_are_read_or_refused(text: str) -> None:
    try:
        _, payload = split_data_url(f"data:{text}")
        decode_base64(payload, 20)
    except InvalidImage:
        return
    assert re.search(r";\s*base64\s*[;,]", text, re.IGNORECASE)


def test_base64() -> None:
    data = bytes(range(256))
    media_type, payload = split_data_url(data_url(data, "Image/PNG"))
    assert (media_type, decode_base64(payload, 256)) == ("image/png", data)
    assert decode_base64("\n".join(payload[i : i + 76] for i in range(0, len(payload), 76)), 256) == data
    assert decode_base64("/w", 1) == decode_base64("/w=", 1) == decode_base64("/w==", 1) == b"\xff"
    for head in ("image/png;BASE64", " Image/PNG ; charset=utf-8; base64 "):
        assert split_data_url(f"DATA:{head},AAAA") == ("image/png", "AAAA")
    for wrong, message in (
        (payload, "at most 100 are read"),
        (payload[:9], "its length or its padding is wrong; encode the whole file"),
        ("a-_b", "it is not in base64: '-' is no character of it"),
        ("aa=a", "it is not in base64: '=' is no character of it"),
        ("é===", "it is not in base64: 'é' is no character of it"),
    ):
        with pytest.raises(InvalidImage, match=message):
            decode_base64(wrong, 100)


def test_images_are_not_kept_open() -> None:
    file = io.BytesIO(KINDS["gif"])
    assert read_image(file.getvalue(), LIMITS).tobytes() == read_image(KINDS["gif"], LIMITS).tobytes()
