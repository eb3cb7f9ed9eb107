"""What passes and what does not."""

import pytest

from penstock.eval.report.words import show_check
from penstock.eval.result import ClosenessReport, Figure, TaskReport
from penstock.eval.statistics import Estimate
from penstock.eval.verdict import DEFAULT_THRESHOLDS, Thresholds, judge


def text(increase: Estimate) -> TaskReport:
    loss = Figure(
        name="loss",
        better="lower",
        is_share=False,
        candidate=Estimate(3.0, 2.9, 3.1),
        reference=Estimate(3.0, 2.9, 3.1),
        difference=Estimate(0.0, 0.0, 0.0),
        increase=increase,
    )
    return TaskReport(name="text", kind="perplexity", num_items=9, data_sha256="", figures=(loss,))


def questions(difference: Estimate) -> TaskReport:
    figure = Figure(
        name="acc", better="higher", is_share=True, candidate=Estimate(0.5, 0.4, 0.6), difference=difference
    )
    return TaskReport(name="asked", kind="multiple_choice", num_items=9, data_sha256="", figures=(figure,))


@pytest.mark.parametrize(
    ("increase", "passed"),
    [
        (Estimate(0.004, 0.001, 0.0099), True),
        (Estimate(-0.2, -0.3, -0.1), True),
        (Estimate(0.004, -0.02, 0.0101), False),  # near enough, but not surely
        (Estimate(0.02, 0.01, 0.03), False),
        (Estimate(0.0, None, None), False),  # one window says nothing
    ],
)
def test_a_loss_passes_if_it_surely_rises_by_no_more_than_one_percent(increase: Estimate, passed: bool) -> None:
    verdict = judge(DEFAULT_THRESHOLDS, [text(increase)])
    assert len(verdict.checks) == 1
    assert verdict.passed is passed
    assert ("more items may decide it" in show_check(verdict.checks[0])) is (increase.high == 0.0101)


@pytest.mark.parametrize(("low", "passed"), [(-0.019, True), (-0.021, False), (0.01, True)])
def test_a_score_may_fall_by_so_many_points(low: float, passed: bool) -> None:
    verdict = judge(Thresholds.parse("score=2%"), [text(Estimate(9.0, 9.0, 9.0)), questions(Estimate(low, low, low))])
    assert [check.what for check in verdict.checks] == ["asked: change of acc"]
    assert verdict.passed is passed


def test_every_check_must_pass() -> None:
    found = ClosenessReport(
        text="text",
        num_tokens=9,
        kl=Estimate(0.02, 0.01, 0.03),
        top1_agreement=Estimate(0.9, 0.88, 0.92),
        loss_increase=Estimate(0, 0, 0),
        layer_errors=None,
    )
    assert judge(Thresholds.parse("kl=0.03,agreement=88%"), [], found).passed
    assert not judge(Thresholds.parse("kl=0.03,agreement=89%"), [], found).passed
    assert not judge(Thresholds.parse("kl=0.029,agreement=88%"), [], found).passed


@pytest.mark.parametrize("wrong", ["loss", "loss=", "loss=-1%", "los=1%", "loss=1%,loss=2%", "kl=nan", "kl=inf", ""])
def test_what_is_no_threshold_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"threshold|twice"):
        Thresholds.parse(wrong)


def test_thresholds_that_nothing_is_measured_for_are_named() -> None:
    every = Thresholds.parse("loss=1%,score=1%,kl=1,agreement=1%,speed=1")
    assert every.unmet_needs(["generation"], has_closeness=False, has_speed=False) == [
        "loss",
        "kl",
        "agreement",
        "speed",
    ]
    assert every.unmet_needs(["perplexity"], has_closeness=True, has_speed=True) == ["score"]
    assert DEFAULT_THRESHOLDS.unmet_needs(["perplexity"], has_closeness=True, has_speed=False) == []
