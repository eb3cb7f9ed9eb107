"""Files that come within a URL, as RFC 2397 has it."""

import binascii
import re

from penstock.errors import InvalidImage

_MOST_NAME_CHARS = 40
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")


def split_data_url(url: str) -> tuple[str, str]:
    """Return the media type of a data: URL and its base64. Raises ``InvalidImage`` for another encoding."""
    head, comma, payload = url[len("data:") :].partition(",")
    media_type, *parameters = (part.strip().lower() for part in head.split(";"))
    if not comma or "base64" not in parameters:
        raise InvalidImage("a data: URL of an image is data:image/png;base64, and the file in base64")
    return media_type[:_MOST_NAME_CHARS], payload


def decode_base64(payload: str, max_bytes: int) -> bytes:
    """Return what ``payload`` stands for, which may be so large; line ends and spaces in it are skipped.

    Its padding may be missing. Raises ``InvalidImage``.
    """
    if any(blank in payload for blank in "\n\r \t"):
        payload = "".join(payload.split())
    if missing := -len(payload) % 4:
        payload += "=" * missing
    num_bytes = len(payload) // 4 * 3 - payload[-2:].count("=")
    if num_bytes > max_bytes:
        raise InvalidImage(f"it has {num_bytes} bytes, and at most {max_bytes} are read; send a smaller file")
    try:
        return binascii.a2b_base64(payload, strict_mode=True)
    except ValueError as error:  # not ASCII, or binascii.Error
        other = _NOT_BASE64.search(payload.rstrip("="))
        why = f"{other[0]!r} is no character of it" if other else "its length or its padding is wrong"
        raise InvalidImage(f"it is not in base64: {why}; encode the whole file") from error
