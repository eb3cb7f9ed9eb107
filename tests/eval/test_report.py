"""Reports: what stands in a page, a card and a plot, and what is read back."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from penstock.errors import InvalidSetting
from penstock.eval import EvalReport, Side, Task, judge, report_closeness, report_tasks
from penstock.eval.forward import Closeness
from penstock.eval.report import format_report, html_page, model_card, read_points, write_reports
from penstock.eval.report.points import Point, frontier, points_of
from penstock.eval.result import Pace, SpeedReport, Spread
from penstock.eval.tasks import ChoiceItem, MultipleChoiceTask, PerplexityTask
from penstock.eval.verdict import DEFAULT_THRESHOLDS

TASKS: list[Task] = [
    PerplexityTask("text & more", "some words"),
    MultipleChoiceTask("asked", [ChoiceItem("Q", ("a", "b"), 0)]),
]
SPREAD = Spread(median=100.0, least=90.0, most=110.0)


def side(label: str, weights_bytes: int) -> Side:
    return Side(
        name="org/base",
        label=label,
        architecture="LlamaForCausalLM",
        dtype="int8",
        kv_dtype="bfloat16",
        num_parameters=6_300_000,
        weights_bytes=weights_bytes,
        kernels="avx2",
    )


def make_report(loss: float = 1.02, label: str = "model <int8>") -> EvalReport:
    draw = np.random.default_rng(0)
    nats = draw.uniform(90, 110, 20)
    reference = np.stack([nats, np.full(20, 100.0), np.full(20, 40.0)], 1)
    candidate = reference * [loss, 1, 1]
    right = (draw.uniform(size=(20, 2)) < 0.5).astype(float)
    choices = np.concatenate([right, np.ones((20, 1))], 1)
    tasks = report_tasks(TASKS, [candidate, choices], [reference, choices])
    closeness = report_closeness(
        "text & more", Closeness(candidate * [0.001, 0.9, 1], tuple(nats * loss), tuple(nats), (0.1, 0.2, 0.3))
    )
    pace = Pace(tokens_per_s=SPREAD, first_token_s=Spread(median=0.01, least=0.009, most=0.02))
    speed = SpeedReport(
        num_prompt_tokens=128,
        num_output_tokens=64,
        num_requests=4,
        num_rounds=5,
        candidate=pace,
        reference=pace,
        tokens_per_s_ratio=SPREAD,
    )
    return EvalReport(
        conditions={
            "penstock": "1",
            "command": "penstock eval <x>",
            "date": "2026-01-01",
            "machine": "a box",
            "python": "3.11",
            "limit": None,
        },
        candidate=side(label, 6 << 20),
        reference=side("model bfloat16", 12 << 20),
        tasks=tasks,
        closeness=closeness,
        speed=speed,
        verdict=judge(DEFAULT_THRESHOLDS, tasks, closeness, speed),
    )


class Page(HTMLParser):
    """Text and tags of a page, which must close what it opens."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words = ""
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href") and tag != "use"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_page_has_everything_and_needs_nothing() -> None:
    earlier = Point("earlier $1 model", 3 << 20, 1.1, None)
    page = Page(html_page(make_report(), [*points_of(make_report()), earlier], loss_bound=0.01))
    assert page.tags.count("svg") == 3
    assert not page.links
    assert "Verdict: FAIL" in page.words
    assert "model <int8> against model bfloat16" in page.words
    assert "text & more: rise of the loss is 2.00%" in page.words
    for label in ("earlier $1 model", "relative error", "weights in memory, MiB", "tokens/s of one answer"):
        assert label in page.words
    # In the first plot alone, for its speed is unknown; the report's own models once in each.
    assert page.words.count("earlier $1 model") == 1
    in_title_heading_and_table = 3
    assert page.words.count("model bfloat16") == in_title_heading_and_table + 2


def test_a_page_of_one_model_has_no_comparison() -> None:
    whole = make_report()
    alone = EvalReport(conditions=whole.conditions, candidate=whole.candidate, reference=None, tasks=())
    page = Page(html_page(alone))
    assert "svg" not in page.tags
    assert "Verdict" not in page.words
    assert "reference" not in format_report(alone)


def test_a_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text(model_card(make_report()))
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.base_model == "org/base"
    assert card.data.pipeline_tag == "text-generation"
    seeing = replace(make_report(), candidate=replace(side("sees", 1), sees=True))
    assert "pipeline_tag: image-text-to-text" in model_card(seeing)
    results = {(result.dataset_name, result.metric_name): result for result in card.data.eval_results}
    assert results["text & more", "token perplexity"].metric_type == "perplexity"
    assert results["text & more", "token perplexity"].metric_value == pytest.approx(np.e ** (1.02 * 1.0), rel=0.05)
    assert results["asked", "accuracy"].dataset_revision == TASKS[1].data_sha256
    text = (tmp_path / "card.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "penstock"
    assert "**Verdict: FAIL**" in text
    assert "not kept: text & more: rise of the loss" in text


def test_a_written_report_can_stand_beside_another(tmp_path: Path) -> None:
    report = make_report()
    files = write_reports(report, tmp_path)
    assert [file.name for file in files] == ["report.json", "report.html", "model-card.md"]
    assert json.loads(files[0].read_text())["verdict"]["passed"] is False
    sha = TASKS[0].data_sha256
    assert read_points(files[0], data_sha256=sha, limit=None) == points_of(report)
    assert [point.weights_bytes >> 20 for point in points_of(report)] == [6, 12]
    for wrong_sha, limit in (("0" * 64, None), (sha, 4)):
        with pytest.raises(InvalidSetting, match="leave --beside out"):
            read_points(files[0], data_sha256=wrong_sha, limit=limit)
    with pytest.raises(InvalidSetting, match=r"no report.json"):
        read_points(files[1], data_sha256=sha, limit=None)


def test_the_frontier_is_of_models_that_no_other_beats() -> None:
    small, middle, big = Point("s", 1, 3.0, None), Point("m", 2, 2.0, None), Point("b", 3, 1.0, None)
    worse, same_size = Point("w", 3, 2.5, None), Point("t", 2, 2.2, None)
    assert frontier([worse, big, same_size, small, middle]) == [small, middle, big]


def test_the_table_says_what_the_verdict_does() -> None:
    failed, passed = format_report(make_report(1.02)), format_report(make_report(1.002))
    assert "verdict    FAIL" in failed
    assert "verdict    PASS" in passed
    assert "ok  text & more: rise of the loss is 0.20%" in passed
    # Every line as wide as a terminal takes.
    assert max(map(len, failed.splitlines())) <= 140
