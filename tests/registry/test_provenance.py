"""What files say of how a model was made and how well it does."""

import json
from pathlib import Path

import pytest

from penstock.errors import InvalidSetting
from penstock.eval.result import EvalReport, Figure, Side, TaskReport
from penstock.eval.statistics import Estimate
from penstock.registry.provenance import MADE_BY, figures, read_metrics, read_recipe


def test_a_report_of_eval_is_its_candidates_figures(tmp_path: Path) -> None:
    loss = Figure(name="loss", better="lower", is_share=False, candidate=Estimate(3.5, 3.4, 3.6))
    task = TaskReport(name="source", kind="perplexity", num_items=2, data_sha256="", figures=(loss,))
    side = Side(
        name="m",
        label="m",
        architecture="A",
        dtype="float32",
        kv_dtype="float32",
        num_parameters=1,
        weights_bytes=4,
        kernels="reference",
    )
    report = EvalReport(conditions={}, candidate=side, reference=None, tasks=(task,))
    (tmp_path / "report.json").write_text(json.dumps(report.to_json()))
    assert figures(read_metrics(tmp_path / "report.json")) == {"source loss": 3.5}


def test_any_numbers_by_name_will_do(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"loss": 3.5, "note": "good", "tasks": 4}')
    assert figures(read_metrics(tmp_path / "metrics.json")) == {"loss": 3.5, "tasks": 4}


@pytest.mark.parametrize("content", ["[1]", "{", "\udcff"])
def test_metrics_that_are_no_object_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InvalidSetting, match=r"metrics\.json"):
        read_metrics(tmp_path / "metrics.json")


def test_a_recipe_is_the_one_given_else_the_one_beside_the_weights(tmp_path: Path) -> None:
    assert read_recipe(None, tmp_path) is None
    (tmp_path / MADE_BY).write_text("beside")
    (tmp_path / "mine.yaml").write_text("given")
    assert read_recipe(None, tmp_path) == "beside"
    assert read_recipe(tmp_path / "mine.yaml", tmp_path) == "given"
    with pytest.raises(InvalidSetting, match="nowhere"):
        read_recipe(tmp_path / "nowhere", tmp_path)
