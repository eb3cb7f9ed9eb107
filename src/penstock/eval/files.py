"""Files of data, with errors that name them."""

from pathlib import Path

from penstock.errors import InvalidSetting


def read_text(path: Path) -> str:
    """Return a file's text. Raises ``InvalidSetting`` if it is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSetting(f"{path} is no text in UTF-8 (byte {error.start}); convert it") from error
    except OSError as error:
        raise InvalidSetting(f"{path} cannot be read: {error.strerror}") from error
