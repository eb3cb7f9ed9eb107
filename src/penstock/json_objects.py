"""The JSON files of a model directory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.errors import ModelUnreadable


def read_json_object(file: Path, *, required: bool = False) -> dict[str, Any]:
    """Return the JSON object in ``file``; empty if it is not there and not required. Raises ``ModelUnreadable``."""
    if not file.is_file():
        if not required:
            return {}
        raise ModelUnreadable(f"{file} does not exist: a model directory in Hugging Face layout has one")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnreadable(f"{file} cannot be read as JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ModelUnreadable(f"{file} holds a {type(value).__name__}, not an object: copy or download it again")
    return value


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Meanwhile, a value in ``file`` that is not of the kind it is used as is a ``ModelUnreadable``."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError, KeyError) as error:
        raise ModelUnreadable(f"{file} holds a value of the wrong kind ({error}); fetch the file again") from error
