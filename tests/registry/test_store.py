"""Versions, stages and what is known of them, in SQLite and in PostgreSQL."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Barrier

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from penstock.errors import InvalidSetting, MissingExtra, ModelUnreadable, NotRegistered, NotVerified
from penstock.registry.store import Registry
from tests.registry.rows import execute


def test_what_is_registered_is_found_again(url: str, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    Registry(url).add(model, name="base")
    added = Registry(url).add(
        model, name="small", parent="base", recipe="steps: []\n", data=[data], metrics={"loss": 3.5}
    )
    found = Registry(url).find("small")
    assert found == added
    assert (found.reference, found.stage, found.path) == ("small:1", "candidate", model)
    assert (found.manifest.parent, found.manifest.recipe, found.metrics) == ("base:1", "steps: []\n", {"loss": 3.5})
    assert [(file.path, file.sha256) for file in found.manifest.data] == [(str(data), sha256(b"{}\n").hexdigest())]
    assert [(file.path, file.size_bytes) for file in found.manifest.files] == [
        ("1_Pooling/config.json", 2),
        ("config.json", 24),
        ("model.safetensors", 1_280_000),
    ]
    assert found.manifest.files[2].sha256 == sha256(bytes(range(256)) * 5000).hexdigest()
    assert [one.reference for one in Registry(url).models()] == ["base:1", "small:1"]


def test_names_mean_versions(url: str, model: Path) -> None:
    registry = Registry(url)
    for version in (None, 7, None):
        registry.add(model, name="a", version=version)
    assert [one.reference for one in registry.models("a")] == ["a:1", "a:7", "a:8"]
    assert registry.find("a").reference == "a:8"
    with pytest.raises(NotRegistered, match=r"no version of a is in production \(1, 7, 8\)"):
        registry.find("a@production")
    registry.set_stage("a:1", "production")
    assert {registry.find(one).reference for one in ("a", "a:1", "a@production")} == {"a:1"}
    for version in (1, 7, 8):
        registry.set_stage(f"a:{version}", "retired")
    with pytest.raises(NotRegistered, match="every version of a is retired"):
        registry.find("a")
    assert registry.find("a:7").stage == "retired"
    with pytest.raises(NotRegistered, match="has no version 2; it has 1, 7, 8"):
        registry.find("a:2")
    with pytest.raises(NotRegistered, match="no model b is registered"):
        registry.find("b")
    with pytest.raises(InvalidSetting, match="a:7 is registered already"):
        registry.add(model, name="a", version=7)
    with pytest.raises(NotRegistered, match="no version 3"):
        registry.add(model, name="a", parent="a:3")


@pytest.mark.parametrize(
    "reference", ["", "a:", "a:0", "a:-1", "a:1.0", "a@candidate", "a b", "../a", "a:1@production"]
)
def test_what_names_nothing_is_refused(reference: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="write NAME, NAME:VERSION or NAME@production"):
        Registry(f"sqlite:///{tmp_path}/registry.db").find(reference)


def test_one_version_is_in_production(url: str, model: Path) -> None:
    registry = Registry(url)
    for name in ("a", "a", "a", "b"):
        registry.add(model, name=name)
    registry.set_stage("b:1", "production")
    assert registry.set_stage("a:1", "production")[1] == []
    now, former = registry.set_stage("a:3", "production")
    assert (now.reference, now.stage, former) == ("a:3", "production", [1])
    assert registry.set_stage("a:3", "production")[1] == []
    assert [one.stage for one in registry.models()] == ["retired", "candidate", "production", "production"]


def test_promotions_at_once_leave_one(url: str, model: Path) -> None:
    for _ in range(4):
        Registry(url).add(model, name="a")
    barrier = Barrier(4)

    def promote(start: int) -> None:
        registry = Registry(url)
        barrier.wait()
        for step in range(5):
            registry.set_stage(f"a:{(start + step) % 4 + 1}", "production")
            assert Counter(one.stage for one in registry.models("a"))["production"] == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(promote, range(4)))


_ADD = """
import sys
from pathlib import Path
from penstock.registry.store import Registry
print("ready", flush=True)
sys.stdin.readline()
for _ in range(4):
    Registry(sys.argv[1]).add(Path(sys.argv[2]), name="a")
"""


def test_processes_at_once_get_versions_of_their_own_from_an_empty_database(url: str, model: Path) -> None:
    """They all find no tables, and the same next number."""
    command = [sys.executable, "-c", _ADD, url, str(model)]
    adding = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for one in adding:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in adding:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in adding:
        _, complaints = one.communicate(timeout=60)
        assert one.returncode == 0, complaints
    assert [one.manifest.version for one in Registry(url).models("a")] == list(range(1, 17))


def test_tables_of_a_later_penstock_are_refused(url: str) -> None:
    Registry(url)
    execute(url, "UPDATE penstock_registry SET schema_version = 2")
    with pytest.raises(InvalidSetting, match="tables of version 2, and this Penstock knows version 1"):
        Registry(url)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("manifest = '{'", "the record of a:1 is damaged"),
        ("manifest = (SELECT manifest FROM penstock_models WHERE version = 2)", "the record of a:1 is that of a:2"),
        ("""manifest = replace(manifest, '"name"', '"nome"')""", "the record of a:1 is damaged"),
    ],
)
def test_a_damaged_record_is_named(change: str, complaint: str, url: str, model: Path) -> None:
    for _ in range(2):
        Registry(url).add(model, name="a")
    execute(url, f"UPDATE penstock_models SET {change} WHERE version = 1")
    with pytest.raises(NotVerified, match=complaint):
        Registry(url).find("a:2")


def test_the_file_is_read_while_it_is_written(tmp_path: Path, model: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    Registry(url).add(model, name="a")
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.exec_driver_sql("UPDATE penstock_models SET stage = 'retired'")
        assert Registry(url).find("a").stage == "candidate"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("registry.db", "registry.url is no database URL"),
        ("sqlite:////nowhere/at/all.db", "sqlite:////nowhere/at/all.db cannot be used: unable to open"),
        ("postgresql+psycopg://me:secret@/x?host=/nowhere", r"postgresql\+psycopg://me:\*\*\*@/x.* cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_named(url: str, complaint: str) -> None:
    with pytest.raises(InvalidSetting, match=complaint) as caught:
        Registry(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["nosuch://x", "postgresql+nosuch://x"])
def test_a_driver_that_is_not_there_is_named(url: str) -> None:
    with pytest.raises(MissingExtra, match="nosuch"):
        Registry(url)


def test_what_is_no_model_is_refused(tmp_path: Path, model: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    with pytest.raises(ModelUnreadable, match=r"holds no config\.json"):
        registry.add(tmp_path, name="a")
    with pytest.raises(ModelUnreadable, match="No such file"):
        registry.add(tmp_path / "nowhere", name="a")
    with pytest.raises(InvalidSetting, match="cannot be a model's name"):
        registry.add(model, name="a:b")
    (model / "more").symlink_to(model / "1_Pooling")
    with pytest.raises(ModelUnreadable, match="holds 'more', which is no plain file"):
        registry.add(model, name="a")
    assert registry.models() == []
