"""Settings merge in one order, and every mistake is named with its source."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from penstock.config import Flag, find_config_file, load_settings
from penstock.errors import InvalidSetting, UnknownSetting


@dataclass(frozen=True, kw_only=True, slots=True)
class Door:
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    names: tuple[str, ...] = ()
    share: float = 0.5
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError(f"share is {self.share}, more than the whole")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    memory_bytes: int | None = None
    prefix_caching: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class House:
    door: Door = field(default_factory=Door)
    cache: Cache = field(default_factory=Cache)
    colour: Literal["white", "red"] = "white"


@dataclass(frozen=True, kw_only=True, slots=True)
class Roof:
    wood: Literal["oak", "ash"] | None = None


def write(directory: Path, text: str) -> Path:
    file = directory / "house.toml"
    file.write_text(text)
    return file


def test_defaults_alone() -> None:
    loaded = load_settings(House)
    assert loaded.settings == House()
    assert {value.origin for value in loaded.values} == {"default"}
    assert [value.key for value in loaded.values][:2] == ["door.port", "door.names"]


def test_each_source_wins_over_the_ones_before_it(tmp_path: Path) -> None:
    file = write(tmp_path, "colour = 'red'\n[door]\nport = 1\nshare = 0.1\n[cache]\nprefix_caching = false")
    loaded = load_settings(
        House,
        file=file,
        environ={
            "PENSTOCK__DOOR__PORT": "2",
            "PENSTOCK__DOOR__SHARE": "0.2",
            "PATH": "/bin",
            "PENSTOCK_CONFIG": "x",
        },
        flags={"door.port": Flag(name="--port", value=3)},
    )
    assert loaded.settings == House(colour="red", door=Door(port=3, share=0.2), cache=Cache(prefix_caching=False))
    origins = {value.key: value.origin for value in loaded.values}
    assert origins == {
        "door.port": "flag --port",
        "door.names": "default",
        "door.share": "env PENSTOCK__DOOR__SHARE",
        "door.log_dir": "default",
        "cache.memory_bytes": "default",
        "cache.prefix_caching": f"file {file}",
        "colour": f"file {file}",
    }


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("DOOR__NAMES", "front, back", ("front", "back")),
        ("CACHE__MEMORY_BYTES", "2GiB", 2 * 1024**3),
        ("CACHE__MEMORY_BYTES", "500 MB", 500_000_000),
        ("CACHE__MEMORY_BYTES", "4096", 4096),
        ("CACHE__MEMORY_BYTES", "null", None),
        ("CACHE__PREFIX_CACHING", "false", False),
        ("DOOR__LOG_DIR", "/var/log", Path("/var/log")),
    ],
)
def test_text_becomes_the_type_of_the_setting(key: str, text: str, value: object) -> None:
    loaded = load_settings(House, environ={f"PENSTOCK__{key}": text})
    assert value in [row.value for row in loaded.values if row.origin.startswith("env")]


def test_sizes_in_a_file_may_carry_units(tmp_path: Path) -> None:
    assert load_settings(House, file=write(tmp_path, "cache.memory_bytes = '1KiB'")).settings.cache.memory_bytes == 1024


@pytest.mark.parametrize(
    ("text", "unknown", "meant"),
    [
        ("[door]\nprot = 1", "door.prot", "door.port"),
        ("port = 1", "port", "door.port"),
        ("[cahce]\nmemory_bytes = 1", "cahce.memory_bytes", "cache.memory_bytes"),
        ("[door.names]\nfirst = 'a'", "door.names", ""),
    ],
)
def test_an_unknown_key_in_a_file_is_named_with_the_nearest_known_one(
    tmp_path: Path, text: str, unknown: str, meant: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises((UnknownSetting, InvalidSetting)) as caught:
        load_settings(House, file=file)
    assert unknown in caught.value.message
    assert meant in caught.value.message
    assert str(file) in caught.value.message


def test_an_unknown_variable_is_named_as_it_is_spelled() -> None:
    with pytest.raises(UnknownSetting, match=r"PENSTOCK__DOOR__PROT .*did you mean PENSTOCK__DOOR__PORT\?"):
        load_settings(House, environ={"PENSTOCK__DOOR__PROT": "1"})


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("DOOR__PORT", "many"),
        ("DOOR__PORT", "70000"),
        ("DOOR__SHARE", "nan"),
        ("DOOR__SHARE", "1.5"),
        ("CACHE__MEMORY_BYTES", "2 boxes"),
        ("CACHE__PREFIX_CACHING", "maybe"),
        ("COLOUR", "blue"),
    ],
)
def test_a_wrong_value_names_itself_and_its_source(key: str, text: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        load_settings(House, environ={f"PENSTOCK__{key}": text})
    assert text in caught.value.message
    assert f"env PENSTOCK__{key}" in caught.value.message


def test_a_wrong_word_is_told_the_right_ones() -> None:
    with pytest.raises(InvalidSetting, match=r"colour cannot be 'blue' \(flag --it\): it can be white, red$"):
        load_settings(House, flags={"colour": Flag(name="--it", value="blue")})
    with pytest.raises(InvalidSetting, match=r"wood cannot be 'elm' \(flag --it\): it can be oak, ash$"):
        load_settings(Roof, flags={"wood": Flag(name="--it", value="elm")})
    assert load_settings(Roof, flags={"wood": Flag(name="--it", value="ash")}).settings.wood == "ash"


def test_a_wrong_flag_names_the_flag() -> None:
    with pytest.raises(InvalidSetting, match=r"door.port cannot be -1 \(flag --port\)"):
        load_settings(House, flags={"door.port": Flag(name="--port", value=-1)})


def test_a_section_is_not_a_setting(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"write \[door\]"):
        load_settings(House, file=write(tmp_path, "door = 3"))


def test_an_empty_section_is_nothing(tmp_path: Path) -> None:
    assert load_settings(House, file=write(tmp_path, "[door]")).settings == House()


def test_a_broken_file_says_where(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"house.toml is not valid TOML.*line 1"):
        load_settings(House, file=write(tmp_path, "port = = 3"))


def test_the_file_is_the_flags_then_the_variables_then_the_one_lying_here(tmp_path: Path) -> None:
    asked, named = tmp_path / "asked.toml", tmp_path / "named.toml"
    for file in (asked, named):
        file.touch()
    assert find_config_file(None, {}, tmp_path) is None
    lying = tmp_path / "penstock.toml"
    lying.touch()
    assert find_config_file(None, {}, tmp_path) == lying
    assert find_config_file(None, {"PENSTOCK_CONFIG": str(named)}, tmp_path) == named
    assert find_config_file(asked, {"PENSTOCK_CONFIG": str(named)}, tmp_path) == asked


@pytest.mark.parametrize("by_flag", [True, False])
def test_a_file_that_was_asked_for_must_exist(tmp_path: Path, by_flag: bool) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(InvalidSetting, match=r"missing\.toml"):
        find_config_file(missing if by_flag else None, {} if by_flag else {"PENSTOCK_CONFIG": str(missing)}, tmp_path)
