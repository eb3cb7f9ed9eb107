"""What was changed after it was registered is found, whatever it was."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.errors import InvalidSetting, NotVerified
from penstock.registry.keys import make_keys, read_private_key
from penstock.registry.store import Registry
from penstock.registry.verify import verify
from tests.registry.rows import execute


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Return a private key and its public one."""
    private = tmp_path / "key"
    public, _ = make_keys(private)
    return private, public


@pytest.fixture
def registry(tmp_path: Path, model: Path, keys: tuple[Path, Path]) -> Registry:
    """Return a registry of one signed model, a:1."""
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    registry.add(model, name="a", key=read_private_key(keys[0]))
    return registry


def test_what_was_registered_is_verified(registry: Registry, model: Path, keys: tuple[Path, Path]) -> None:
    found = verify(registry.find("a"), keys[1])
    assert found.is_trusted
    assert found.describe().startswith("a:1 (candidate): 3 files, 1.2 MiB, as registered; signed by ")
    assert not verify(registry.find("a"), None).is_trusted
    # Neither is the model.
    (model / ".git").mkdir()
    (model / ".git" / "index").write_text("x")
    verify(registry.find("a"), keys[1])


def _flip_a_bit(model: Path) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[640_000] ^= 1
    (model / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_flip_a_bit, "model.safetensors changed"),
        (lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors changed"),
        (lambda model: (model / "1_Pooling" / "config.json").unlink(), "1_Pooling/config.json missing"),
        (lambda model: (model / "model-2.safetensors").write_bytes(b"x"), "model-2.safetensors added"),
        (lambda model: (model / ".hidden.safetensors").write_bytes(b"x"), ".hidden.safetensors added"),
        (lambda model: (model / "config.json").rename(model / "c.json"), "config.json missing; c.json added"),
        (shutil.rmtree, "nothing is there now; move it back"),
    ],
    ids=["flipped", "emptied", "missing", "added", "hidden", "renamed", "moved"],
)
@pytest.mark.parametrize("is_signed", [True, False])
def test_changed_files_are_named(
    change: Callable[[Path], object], complaint: str, is_signed: bool, registry: Registry, model: Path
) -> None:
    if not is_signed:
        registry.add(model, name="a")
    change(model)
    with pytest.raises(NotVerified) as caught:
        verify(registry.find("a"), None)
    assert complaint in str(caught.value)


def test_only_some_of_many_are_named(registry: Registry, model: Path) -> None:
    for number in range(9):
        (model / f"{number}.json").write_text("")
    with pytest.raises(NotVerified, match=r"0.json, 1.json, 2.json, 3.json, 4.json and 4 more added"):
        verify(registry.find("a"), None)


@pytest.mark.parametrize(
    "change",
    [
        """manifest = replace(manifest, '"parent":null', '"parent":"b:1"')""",
        "manifest = manifest || ' '",
        "signature = x'00'",
        "signature = NULL",
        "signature = zeroblob(64)",
        "public_key = zeroblob(32)",
    ],
)
def test_a_changed_record_does_not_fit_its_signature(change: str, registry: Registry, tmp_path: Path) -> None:
    execute(f"sqlite:///{tmp_path}/registry.db", f"UPDATE penstock_models SET {change}")
    with pytest.raises(NotVerified, match="the signature of a:1 is not one of its record"):
        verify(registry.find("a"), None)


def test_whoever_resigns_what_he_changed_is_found_out_by_the_key_that_counts(
    registry: Registry, model: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_keys(other)
    _flip_a_bit(model)
    registry.add(model, name="a", key=read_private_key(other))
    verify(registry.find("a:2"), None)
    with pytest.raises(NotVerified, match=r"a:2 is signed by \w{16}, and has to be by \w{16} \(.*key\.pub\)"):
        verify(registry.find("a:2"), keys[1])
    registry.add(model, name="a")
    with pytest.raises(NotVerified, match="a:3 is not signed, and has to be by"):
        verify(registry.find("a:3"), keys[1])


def test_one_file_is_a_model_too(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    registry.add(file, name="a")
    (tmp_path / "beside.json").write_text("")
    verify(registry.find("a"), None)
    file.write_bytes(b"GGUF" + bytes(99) + b"x")
    with pytest.raises(NotVerified, match=r"model\.gguf changed"):
        verify(registry.find("a"), None)


def test_a_private_key_is_its_owners_and_is_never_overwritten(keys: tuple[Path, Path]) -> None:
    private, public = keys
    before = private.read_bytes()
    assert private.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InvalidSetting, match="exists"):
        make_keys(private)
    public.unlink()
    with pytest.raises(InvalidSetting, match="a key is never overwritten"):
        make_keys(private)
    assert private.read_bytes() == before
    assert not public.exists()


def test_what_is_no_key_is_named(keys: tuple[Path, Path], model: Path) -> None:
    private, public = keys
    for path, complaint in [
        (public, "holds no private key"),
        (model / "config.json", "holds no private key"),
        (model / "nowhere", "cannot be read: No such file"),
    ]:
        with pytest.raises(InvalidSetting, match=complaint):
            read_private_key(path)
    registry = Registry(f"sqlite:///{model.parent}/other.db")
    added = registry.add(model, name="a", key=read_private_key(private))
    with pytest.raises(InvalidSetting, match="holds no public key"):
        verify(added, private)
