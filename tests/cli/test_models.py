"""`penstock models` as a person types it, and what `penstock serve` makes of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.commands import run, run_here, serving


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's data, registry included, in a directory of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    return tmp_path / "share" / "penstock" / "registry.db"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def ok(*arguments: str) -> str:
    result = run_here(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(*arguments: str) -> str:
    result = (run if arguments[0] == "serve" else run_here)(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_models_life(registry: Path, model: Path, tmp_path: Path) -> None:
    key, data, metrics = str(tmp_path / "key"), tmp_path / "train.jsonl", tmp_path / "metrics.json"
    data.write_text("{}\n")
    nothing = run_here("models", "list")
    assert (nothing.stdout, nothing.returncode) == ("", 0)
    assert "no model is registered in sqlite:///" in nothing.stderr
    metrics.write_text('{"loss": 3.25}')
    assert "public key" in ok("models", "keygen", key)
    assert "exists" in refused("models", "keygen", key)
    assert ok("models", "add", str(model), "--name", "a").startswith("a:1: 2 files, 9 B, not signed")
    options = ["--parent", "a:1", "--data", str(data), "--metrics", str(metrics), "--key", key]
    assert "signed by" in ok("models", "add", str(model), "--name", "a", *options)
    assert registry.is_file()
    assert ok("models", "stage", "a:1", "production") == "a:1: production\n"
    assert ok("models", "stage", "a:2", "production") == "a:2: production\na:1: retired\n"
    listed = json.loads(ok("models", "list", "--json"))
    assert [(one["version"], one["stage"], one["parent"]) for one in listed] == [
        (1, "retired", None),
        (2, "production", "a:1"),
    ]
    assert [line.split()[:2] for line in ok("models", "list").splitlines()[1:]] == [
        ["a:1", "retired"],
        ["a:2", "production"],
    ]
    shown = ok("models", "show", "a")
    for part in ("a:2", "loss 3.25", str(data), "model.safetensors", str(model)):
        assert part in shown
    assert "a:2 (production): 2 files, 9 B, as registered" in ok("models", "verify", "a", "--public-key", f"{key}.pub")
    (model / "model.safetensors").write_bytes(b"Weights")
    assert "model.safetensors changed" in refused("models", "verify", "a")


def test_the_registry_is_the_flags_else_the_settings(
    registry: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = ["--registry", f"sqlite:///{tmp_path}/flag.db"]
    monkeypatch.setenv("PENSTOCK__REGISTRY__URL", f"sqlite:///{tmp_path}/setting.db")
    ok("models", "add", str(model), "--name", "of-flag", *flag)
    ok("models", "add", str(model), "--name", "of-setting")
    assert [one["name"] for one in json.loads(ok("models", "list", "--json", *flag))] == ["of-flag"]
    assert [one["name"] for one in json.loads(ok("models", "list", "--json"))] == ["of-setting"]
    assert not registry.exists()


def test_what_cannot_be_done_is_said_in_a_line(registry: Path, model: Path) -> None:
    assert "no model a is registered" in refused("models", "show", "a")
    assert "no model a is registered" in refused("serve", "registry:a", "--port", "0")
    assert "no model a is registered" in refused("chat", "registry:a", "--prompt", "x")
    assert "names no registered model" in refused("eval", "registry:a/b")
    assert "holds no config.json" in refused("models", "add", str(model.parent), "--name", "a")


def test_a_missing_extra_is_named(registry: Path) -> None:
    code = "import sys; sys.modules['sqlalchemy'] = None\nfrom penstock.cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "models", "list"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: the registry needs sqlalchemy; pip install 'penstock[registry]'\n"


def test_a_registered_model_is_served_once_it_is_verified(
    registry: Path, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    few = ["--samples", "4", "--sample-tokens", "48", "--force"]
    ok("compress", str(checkpoint("llama")), "-o", str(model), "--recipe", "int8", *few)
    ok("models", "keygen", str(tmp_path / "key"))
    ok("models", "add", str(model), "--name", "small", "--key", str(tmp_path / "key"))
    ok("models", "stage", "small:1", "production")
    made = json.loads(json.loads(ok("models", "show", "small", "--json"))["recipe"])
    assert made["recipe"]["steps"][0]["bits"] == 8
    assert len(made["calibration"]["sha256"]) == 64
    monkeypatch.setenv("PENSTOCK__REGISTRY__PUBLIC_KEY", str(tmp_path / "key.pub"))
    with serving("registry:small@production") as server:
        assert any("small:1 (production)" in line and "as registered; signed by" in line for line in server.said)
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "small"
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert "model.safetensors changed" in refused("serve", "registry:small", "--port", "0")
