"""Settings from a file, the environment and flags, merged into the dataclasses of those they configure.

This module knows no component. A component describes its settings as a frozen dataclass whose fields have defaults
and may be such dataclasses themselves; ``load_settings`` fills one in, later sources over earlier ones:

    defaults < TOML file < environment PENSTOCK__SECTION__KEY < flags

A key is dotted everywhere in here (``server.port``); an error spells it as its source does.
"""

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from penstock.errors import ConfigError, InvalidSetting, UnknownSetting
from penstock.units import parse_bytes

SettingsT = TypeVar("SettingsT")

ENV_PREFIX = "PENSTOCK__"
CONFIG_FILE_VARIABLE = "PENSTOCK_CONFIG"
DEFAULT_CONFIG_FILE = "penstock.toml"

# What most settings may be.
Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """A value given on the command line."""

    name: str
    """As typed: ``--port``."""
    value: object


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingValue:
    """One setting as it came out of the merge."""

    key: str
    value: object
    origin: str
    """``default``, ``file penstock.toml``, ``env PENSTOCK__SERVER__PORT`` or ``flag --port``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded(Generic[SettingsT]):
    """Merged settings and where each value came from."""

    settings: SettingsT
    values: tuple[SettingValue, ...]
    """One per setting, in the order the dataclasses declare them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """A value some source gave, before it is checked."""

    value: object
    origin: str


def find_config_file(flag: Path | None, environ: Mapping[str, str], directory: Path) -> Path | None:
    """Return the file to read: ``flag``, else ``PENSTOCK_CONFIG``, else a ``penstock.toml`` in ``directory``.

    Raises InvalidSetting when a file that was asked for does not exist.
    """
    asked = [(flag, "--config"), (environ.get(CONFIG_FILE_VARIABLE) or None, CONFIG_FILE_VARIABLE)]
    for path, origin in asked:
        if path is not None:
            if not Path(path).is_file():
                raise InvalidSetting(f"no settings file at {path} ({origin}); create it or leave {origin} out")
            return Path(path)
    default = directory / DEFAULT_CONFIG_FILE
    return default if default.is_file() else None


def load_settings(
    kind: type[SettingsT],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Loaded[SettingsT]:
    """Return ``kind`` filled in from its defaults, ``file``, ``environ`` and ``flags`` (by dotted key).

    Raises UnknownSetting for a key nobody declared and InvalidSetting for a value that cannot be honoured; both
    name the source.
    """
    declared = dict(_declared(kind))
    given: dict[str, _Given] = {}
    if file is not None:
        given |= _from_file(file, declared)
    given |= _from_environ(environ or {}, declared)
    for key, flag in (flags or {}).items():
        assert key in declared, f"flag {flag.name} names no setting: {key}"
        given[key] = _Given(value=flag.value, origin=f"flag {flag.name}")
    checked = {key: _convert(key, found, declared[key]) for key, found in given.items()}
    settings = _build(kind, "", checked, given)
    return Loaded(settings=settings, values=tuple(_rows(settings, "", given)))


def _declared(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf's dotted key and type, outer declarations first."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        key, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _declared(hint, f"{key}.")
        else:
            yield key, hint


def _from_file(file: Path, declared: Mapping[str, Any]) -> dict[str, _Given]:
    origin = f"file {file}"
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{file} is not valid TOML: {error}") from error
    except OSError as error:
        raise InvalidSetting(f"cannot read the settings file {file}: {error.strerror}") from error
    given = {}
    for key, value in _leaves(tree, declared, origin):
        if key not in declared:
            raise _unknown(key, declared, ".", origin)
        given[key] = _Given(value=value, origin=origin)
    return given


def _leaves(tree: Mapping[str, Any], declared: Mapping[str, Any], origin: str, prefix: str = "") -> Iterator[Any]:
    """Yield dotted keys and values. A table is a section, whoever declared it, unless a setting has its name."""
    for name, value in tree.items():
        key = prefix + name
        is_section = any(other.startswith(f"{key}.") for other in declared)
        if is_section and not isinstance(value, dict):
            raise InvalidSetting(
                f"{key} is a section, not a setting ({origin}); write [{key}] above its keys", param=key
            )
        if is_section or (isinstance(value, dict) and value and key not in declared):
            yield from _leaves(value, declared, origin, f"{key}.")
        else:
            yield key, value


def _from_environ(environ: Mapping[str, str], declared: Mapping[str, Any]) -> dict[str, _Given]:
    spelled = {ENV_PREFIX + key.replace(".", "__").upper(): key for key in declared}
    given = {}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX):
            continue
        if name not in spelled:
            raise _unknown(name, spelled, "__", "environment")
        given[spelled[name]] = _Given(value=value, origin=f"env {name}")
    return given


def _unknown(spelled: str, known: Iterable[str], separator: str, origin: str) -> UnknownSetting:
    """Return the error for a setting nobody declared, with the nearest of the ``known`` ones."""

    def nearness(name: str) -> float:
        # The last word counts on its own too: a right name in the wrong section is far from every full key.
        parts = (spelled, name), (spelled.rsplit(separator, 1)[-1], name.rsplit(separator, 1)[-1])
        return sum(difflib.SequenceMatcher(None, given, candidate).ratio() for given, candidate in parts)

    return UnknownSetting(
        f"unknown setting {spelled} ({origin}); did you mean {max(known, key=nearness)}? "
        "`penstock config show` lists all settings",
        param=spelled,
    )


def _convert(key: str, given: _Given, hint: Any) -> object:
    value = given.value
    try:
        if isinstance(value, str):
            value = _from_text(key, value, hint)
        words = _words(hint)
        if words and isinstance(value, str) and value not in words:
            raise ValueError(f"it can be {', '.join(words)}")
        converted: object = msgspec.convert(value, hint, strict=False, dec_hook=_decode)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError("expected a finite number")
    except (ValueError, msgspec.ValidationError) as error:
        raise _invalid(key, given, str(error)) from error
    return converted


def _from_text(key: str, text: str, hint: Any) -> object:
    """Return what ``text`` stands for where a source can only give strings or people write units."""
    kinds = _alternatives(hint)
    if key.endswith("_bytes") and int in kinds and text != "null":
        return parse_bytes(text)
    if tuple in kinds or list in kinds:
        return [item.strip() for item in text.split(",") if item.strip()]
    return text


def _alternatives(hint: Any) -> set[Any]:
    """Return the plain types a value may have: int and NoneType for ``int | None``."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _alternatives(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(_alternatives(part) for part in get_args(hint)))
    return {origin or hint}


def _words(hint: Any) -> list[str]:
    """Return the words that a value has to be among; none if it may be something else than words."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_words(part) for part in get_args(hint) if part is not types.NoneType]
        return [word for part in parts for word in part] if all(parts) else []
    return [str(word) for word in get_args(hint)] if get_origin(hint) is Literal else []


def _decode(kind: type[Any], value: object) -> object:
    """Extend msgspec by paths."""
    if issubclass(kind, Path) and isinstance(value, str | Path):
        return Path(value).expanduser()
    raise NotImplementedError(f"settings of type {kind.__name__}")


def _invalid(key: str, given: _Given, reason: str) -> InvalidSetting:
    reason = reason[0].lower() + reason[1:]
    return InvalidSetting(f"{key} cannot be {given.value!r} ({given.origin}): {reason}", param=key)


def _build(kind: type[Any], prefix: str, checked: Mapping[str, object], given: Mapping[str, _Given]) -> Any:
    """Construct ``kind``; a component that refuses its values in ``__post_init__`` gets their source named."""
    hints = get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        key, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            arguments[field.name] = _build(hint, f"{key}.", checked, given)
        elif key in checked:
            arguments[field.name] = checked[key]
    try:
        return kind(**arguments)
    except (ValueError, ConfigError) as error:
        set_here = [
            f"{key} = {found.value!r} ({found.origin})" for key, found in given.items() if key.startswith(prefix)
        ]
        raise InvalidSetting(f"{error}; set: {', '.join(set_here)}", param=prefix.rstrip(".") or None) from error


def _rows(settings: Any, prefix: str, given: Mapping[str, _Given]) -> Iterator[SettingValue]:
    for field in dataclasses.fields(settings):
        key, value = prefix + field.name, getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _rows(value, f"{key}.", given)
        else:
            yield SettingValue(key=key, value=value, origin=given[key].origin if key in given else "default")
