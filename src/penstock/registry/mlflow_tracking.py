"""Telling an MLflow server how a model was made and how well it does: the extra ``penstock[mlflow]``."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from penstock.errors import InvalidSetting, MissingExtra, UnavailableError
from penstock.registry.provenance import MADE_BY, figures, read_metrics

_ARTIFACTS = (MADE_BY, "recipe.yaml", "sensitivity.json", "README.md", "config.json")
"""Files beside the weights that are sent if they are there; weights are not"""
_MOST_PARAM = 6000
"""Characters that MLflow takes of a parameter's value"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """Where a run can be found."""

    run_id: str
    experiment: str
    tracking_uri: str


def track(model: Path, *, name: str, experiment: str, tracking_uri: str | None, report: Path | None) -> TrackedRun:
    """Make a run called ``name`` of directory ``model`` in ``experiment`` on an MLflow server.

    Parameters are what ``compression.json`` says, metrics the figures of ``report`` (what `penstock eval --json`
    printed) and the size; artifacts these files, recipe and model card. ``tracking_uri`` None: MLflow's own, by
    ``MLFLOW_TRACKING_URI``.
    Raises ``MissingExtra``; ``InvalidSetting`` for what cannot be read; ``UnavailableError`` if the server does not
    answer.
    """
    if find_spec("mlflow") is None:
        raise MissingExtra("tracking needs MLflow's client; pip install 'penstock[mlflow]'")
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise InvalidSetting(f"{model} has no safetensors files; give a model directory in Hugging Face layout")
    measured = {} if report is None else figures(read_metrics(report))
    # Slow to import, and optional.
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        found = client.get_experiment_by_name(experiment)
        experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
        run_id = client.create_run(experiment_id, run_name=name).info.run_id
        try:
            for key, value in _params(model):
                client.log_param(run_id, key, value[:_MOST_PARAM])
            client.log_metric(run_id, "weights_bytes", sum(file.stat().st_size for file in files))
            for key, number in measured.items():
                client.log_metric(run_id, key, number)
            for file in (*(model / one for one in _ARTIFACTS), *([] if report is None else [report])):
                if file.is_file():
                    client.log_artifact(run_id, str(file))
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")
    except MlflowException as error:
        raise UnavailableError(
            f"MLflow did not take the run: {error}; is {tracking_uri or 'its server'} up?"
        ) from error
    return TrackedRun(run_id=run_id, experiment=experiment, tracking_uri=str(client.tracking_uri))


def _params(model: Path) -> Iterator[tuple[str, str]]:
    """Yield what ``compression.json`` says, nested names joined by dots; nothing without one."""
    file = model / MADE_BY
    if file.is_file():
        yield from _flat(read_metrics(file), "")


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)
