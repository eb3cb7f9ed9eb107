"""A checkpoint's quantization_config, read key by key: every complaint names key and remedy."""

import re
from collections.abc import Mapping
from typing import Any

from penstock.errors import ModelUnreadable

REMEDY = "serve the model's bf16 checkpoint, with --quantize int8 or int4 if it is to be small"


class Settings:
    """The values of one object in the configuration. Methods raise ``ModelUnreadable``."""

    def __init__(self, values: object, where: str) -> None:
        """Take ``values``, which stand at ``where``."""
        self.where = where
        if not isinstance(values, Mapping):
            raise ModelUnreadable(f"{where} is {values!r}, of the wrong kind: it is an object of settings")
        self.values: Mapping[str, Any] = values

    def part(self, key: str) -> "Settings | None":
        """Return the object under ``key``, None where there is none."""
        value = self.values.get(key)
        return None if value is None else Settings(value, f"{self.where}.{key}")

    def integer(self, key: str) -> int:
        """Return an integer."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.bad(key, value, "an integer")
        return value

    def bits(self, key: str, allowed: range | tuple[int, ...]) -> int:
        """Return how many bits a code has."""
        bits = self.integer(key)
        if bits not in allowed:
            raise self.bad(key, bits, f"one of {', '.join(map(str, allowed))}")
        return bits

    def group(self, key: str) -> int | None:
        """Return how many inputs share a scale; None, said as -1, where all do."""
        if self.values.get(key) is None or self.integer(key) == -1:
            return None
        if self.integer(key) < 1:
            raise self.bad(key, self.integer(key), "a positive number of inputs, or -1")
        return self.integer(key)

    def only(self, key: str, allowed: tuple[object, ...]) -> object:
        """Return the value of ``key``, which has to be one of ``allowed``, texts in lower case."""
        value = self.values.get(key)
        found = value.lower() if isinstance(value, str) else value
        if found not in allowed:
            raise self.bad(key, value, " or ".join(str(name) for name in allowed if name is not None))
        return found

    def bad(self, key: str, value: object, wanted: str) -> ModelUnreadable:
        """Return the error that says ``key`` cannot be ``value``."""
        return ModelUnreadable(f"{self.where}.{key} is {value!r}, and Penstock reads {wanted}; {REMEDY}")


def matches(pattern: str, name: str) -> bool:
    """Return whether ``name`` begins with what the regular expression says. Raises ``ModelUnreadable``."""
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ModelUnreadable(f"quantization_config has the pattern {pattern!r}, which is none: {error}") from error
