"""Image files for tests, drawn and encoded here."""

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image, ImageDraw


def drawing(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """Return an image that is another one however it is turned: red left of a blue disc, with a grey ramp below."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 4, height // 2), fill=(200, 30, 30))
    draw.ellipse((width // 2, height // 8, width - 2, height // 2), fill=(20, 20, 180))
    for x in range(width):
        draw.line((x, height * 3 // 4, x, height - 1), fill=(255 * x // width,) * 3)
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    """Return a file as a URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG whose header promises so many pixels, and that has none."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


def png_without_rows(image: Image.Image, num_rows: int) -> bytes:
    """Return the PNG of an image whose data lack its last rows, with a header and checksums that are right."""
    data = encoded(image)
    begin = data.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", data[begin : begin + 4])
    rows = zlib.decompress(data[begin + 8 : begin + 8 + length])
    kept = rows[: len(rows) // image.height * (image.height - num_rows)]
    return data[:begin] + png_chunk(b"IDAT", zlib.compress(kept)) + data[begin + 12 + length :]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def animated(kind: str, colours: list[str], duration_ms: int = 250, size: tuple[int, int] = (32, 24)) -> bytes:
    """Return an animation of single colours."""
    first, *others = [Image.new("RGB", size, colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(first, kind, save_all=True, append_images=others, duration=duration_ms, **options)
