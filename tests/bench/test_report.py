"""Every figure is what its definition says."""

import json
from pathlib import Path

import pytest

from penstock.bench import BenchReport, Outcome, Run, Slo, format_table, report_run, write_plot
from penstock.bench.report import percentile


def outcome(*, due_s: float = 0.0, piece_s: tuple[float, ...] = (1.0, 2.0, 4.0), error: str | None = None) -> Outcome:
    return Outcome(
        num_prompt_tokens=10,
        num_output_tokens=0 if error else len(piece_s),
        due_s=due_s,
        piece_s=piece_s,
        finished_s=piece_s[-1] if piece_s else due_s,
        error=error,
    )


RUN = Run(
    outcomes=(
        outcome(),
        outcome(due_s=1.0, piece_s=(5.0, 5.5, 6.0)),
        outcome(piece_s=(0.5,), error="overloaded"),
        outcome(piece_s=(), error="overloaded"),
    ),
    duration_s=6.0,
)


def test_throughput_counts_whole_answers_only() -> None:
    report = report_run(RUN, None)
    assert (report.num_requests, report.num_whole) == (4, 2)
    assert report.output_tokens_per_s == 6 / 6
    assert report.total_tokens_per_s == (6 + 20) / 6
    assert report.requests_per_s == 2 / 6
    assert report.errors == {"overloaded": 2}
    assert report.goodput_per_s is None


def test_latencies() -> None:
    report = report_run(RUN, None)
    assert report.ttft is not None
    assert (report.ttft.p50_s, report.ttft.p99_s) == pytest.approx((2.5, 3.97))
    assert report.inter_token is not None
    assert report.inter_token.mean_s == pytest.approx((1 + 2 + 0.5 + 0.5) / 4)
    assert report.e2e is not None
    assert report.e2e.mean_s == pytest.approx((4 + 5) / 2)


def test_nothing_whole_has_no_latency() -> None:
    report = report_run(Run(outcomes=(outcome(error="worker_died"),), duration_s=1.0), Slo(ttft_s=1))
    assert report.ttft is report.inter_token is report.e2e is None
    assert report.goodput_per_s == 0


@pytest.mark.parametrize(
    ("slo", "num_good"),
    [
        (Slo(), 2),
        (Slo(ttft_s=1.0), 1),
        (Slo(ttft_s=0.9), 0),
        (Slo(itl_s=0.5), 1),
        (Slo(itl_s=1.5), 2),
        (Slo(e2e_s=4.0), 1),
        (Slo(ttft_s=1.0, itl_s=0.5), 0),
    ],
)
def test_goodput_counts_answers_within_every_bound(slo: Slo, num_good: int) -> None:
    report = report_run(RUN, slo)
    assert report.goodput_per_s == num_good / 6
    assert report.slo_share == num_good / 4


def test_slos_are_read() -> None:
    assert Slo.parse("ttft=1s,itl=100ms") == Slo(ttft_s=1.0, itl_s=0.1)
    assert Slo.parse(" e2e=2min ") == Slo(e2e_s=120.0)
    assert str(Slo.parse("ttft=1s,itl=100ms")) == "ttft <= 1 s, itl <= 100 ms"


@pytest.mark.parametrize("text", ["", "ttft", "tpot=1s", "ttft=soon"])
def test_what_is_no_slo(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        Slo.parse(text)


def test_percentiles_interpolate() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0], at) for at in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert percentile([7.0], 99) == 7.0


def full_report(num_runs: int) -> BenchReport:
    slo = Slo(ttft_s=1.0)
    faster = Run(outcomes=RUN.outcomes, duration_s=3.0)
    runs = [RUN, faster][:num_runs]
    return BenchReport(
        target="mini", conditions={"num_requests": 4}, slo=slo, runs=tuple(report_run(run, slo) for run in runs)
    )


def test_the_table_shows_the_spread_of_repetitions() -> None:
    table = format_table(full_report(2))
    assert "output tokens/s" in table
    assert "median" in table
    line = next(line for line in table.splitlines() if line.startswith("output tokens/s"))
    assert line.split()[-3:] == ["1.5", "1.0", "2.0"]
    assert "errors: overloaded" in table
    assert "SLO: ttft <= 1 s" in table


def test_one_repetition_has_no_spread() -> None:
    assert "median" not in format_table(full_report(1))


def test_json_holds_conditions_runs_and_spread() -> None:
    data = json.loads(json.dumps(full_report(2).to_json()))
    assert data["conditions"] == {"num_requests": 4}
    assert [run["duration_s"] for run in data["runs"]] == [6.0, 3.0]
    assert data["spread"]["output_tokens_per_s"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert data["slo"]["ttft_s"] == 1.0


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.png"
    write_plot(file, "mini", [RUN])
    assert file.read_bytes().startswith(b"\x89PNG")
