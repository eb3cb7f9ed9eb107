"""How versions of models are named: NAME, NAME:VERSION, NAME@production."""

import re
from dataclasses import dataclass

from penstock.errors import InvalidSetting

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REFERENCE = re.compile(rf"(?P<name>{_NAME.pattern})(:(?P<version>[1-9][0-9]{{0,8}})|(?P<production>@production))?")


@dataclass(frozen=True, slots=True)
class Reference:
    """Which version of which model."""

    name: str
    version: int | None
    """None: the one in production, else the highest that is not retired"""
    in_production: bool


def require_name(name: str) -> None:
    """Raise ``InvalidSetting`` for what cannot be a model's name."""
    if not _NAME.fullmatch(name):
        raise InvalidSetting(
            f"{name!r} cannot be a model's name: letters, digits, dots, dashes and underscores can, up to 100 of them"
        )


def parse_reference(text: str) -> Reference:
    """Return what ``text`` names. Raises ``InvalidSetting``."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise InvalidSetting(f"{text!r} names no registered model; write NAME, NAME:VERSION or NAME@production")
    version = int(found["version"]) if found["version"] else None
    return Reference(found["name"], version, in_production=found["production"] is not None)
