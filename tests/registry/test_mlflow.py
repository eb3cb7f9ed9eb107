"""Tracking, on a real MLflow server of the test's own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.errors import InvalidSetting, MissingExtra
from penstock.registry import mlflow_tracking
from penstock.registry.mlflow_tracking import track


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{tmp_path}/runs.db", "--artifacts-destination", str(tmp_path / "kept")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with (tmp_path / "server.log").open("wb") as log:
        # Its workers are its own group, which ends with it.
        server = subprocess.Popen(
            [*command, *stores], stdout=log, stderr=log, cwd=tmp_path, env=environment, start_new_session=True
        )
    try:
        _wait(f"{url}/health", server)
        yield url
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert server.poll() is None, "the MLflow server ended"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the MLflow server did not come up")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_has_recipe_figures_and_files(model: Path, mlflow_server: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    made_by = {"model": "big", "recipe": {"steps": [{"match": "decoder", "bits": 4}]}, "calibration": {"sha256": "ab"}}
    (model / "compression.json").write_text(json.dumps(made_by))
    (model / "README.md").write_text("---\nbase_model: big\n---\n")
    report = tmp_path / "report.json"
    report.write_text('{"perplexity": 12.5}')
    run = track(model, name="four bits", experiment="sizes", tracking_uri=mlflow_server, report=report)
    again = track(model, name="again", experiment="sizes", tracking_uri=mlflow_server, report=None)
    client = MlflowClient(mlflow_server)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "four bits"
    assert found.info.experiment_id == client.get_run(again.run_id).info.experiment_id
    assert found.data.params["model"] == "big"
    assert found.data.params["calibration.sha256"] == "ab"
    assert json.loads(found.data.params["recipe.steps"])[0]["bits"] == 4
    assert found.data.metrics == {"perplexity": 12.5, "weights_bytes": (model / "model.safetensors").stat().st_size}
    kept = {file.path for file in client.list_artifacts(run.run_id)}
    assert kept == {"compression.json", "README.md", "config.json", "report.json"}
    copy = client.download_artifacts(run.run_id, "README.md", str(tmp_path))
    assert "base_model: big" in Path(copy).read_text()


def test_without_the_client_the_extra_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracking, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"penstock\[mlflow\]"):
        track(model, name="a", experiment="b", tracking_uri=None, report=None)


def test_a_directory_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracking, "find_spec", lambda name: object())
    with pytest.raises(InvalidSetting, match="no safetensors"):
        track(tmp_path, name="a", experiment="b", tracking_uri=None, report=None)
