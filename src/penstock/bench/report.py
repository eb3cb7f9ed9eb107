"""Turn runs into figures, each with one definition, and figures into a table or JSON.

Latencies and token counts are of whole answers only; an answer that failed counts under ``errors`` and nowhere
else. Percentiles interpolate linearly between the two nearest values.
"""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from penstock.bench.load import Outcome, Run
from penstock.units import format_duration, parse_duration

if TYPE_CHECKING:
    from penstock.bench.profile import ProfileReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """What an answer must keep to count towards goodput; None leaves a bound out."""

    ttft_s: float | None = None
    """Bound on the time to first token."""
    itl_s: float | None = None
    """Bound on the mean inter-token latency of the answer."""
    e2e_s: float | None = None
    """Bound on the end-to-end latency."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what ``ttft=1s,itl=100ms,e2e=10s`` says, in any order. Raises ValueError for anything else."""
        bounds: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or name not in ("ttft", "itl", "e2e"):
                raise ValueError(f"{part!r} is not a bound; write ttft=1s, itl=100ms or e2e=10s")
            bounds[f"{name}_s"] = parse_duration(value)
        return cls(**bounds)

    def __str__(self) -> str:
        bounds = (("ttft", self.ttft_s), ("itl", self.itl_s), ("e2e", self.e2e_s))
        return ", ".join(f"{name} <= {format_duration(value)}" for name, value in bounds if value is not None)

    def is_met_by(self, outcome: Outcome) -> bool:
        """Whether a whole answer came within every bound."""
        if outcome.error is not None:
            return False
        gaps_s = outcome.gaps_s
        mean_gap_s = statistics.fmean(gaps_s) if gaps_s else 0.0
        measured = ((self.ttft_s, outcome.ttft_s), (self.itl_s, mean_gap_s), (self.e2e_s, outcome.e2e_s))
        return all(bound is None or (value is not None and value <= bound) for bound, value in measured)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """How a latency was distributed."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float

    @classmethod
    def of(cls, values_s: Iterable[float]) -> Self | None:
        """Return the distribution of ``values_s``; None of nothing."""
        ordered = sorted(values_s)
        if not ordered:
            return None
        return cls(
            mean_s=statistics.fmean(ordered),
            p50_s=percentile(ordered, 50),
            p90_s=percentile(ordered, 90),
            p99_s=percentile(ordered, 99),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """The figures of one repetition."""

    duration_s: float
    """From the first request's due time to the end of the last answer."""
    num_requests: int
    num_whole: int
    """Requests answered to the end."""
    errors: dict[str, int]
    """Failed requests by error code."""
    num_prompt_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    """Output tokens of whole answers over the duration."""
    prompt_tokens_per_s: float
    """Prompt tokens of whole answers over the duration: with one output token each, the speed of prefill."""
    total_tokens_per_s: float
    """Prompt and output tokens of whole answers over the duration."""
    requests_per_s: float
    """Whole answers over the duration."""
    stream_tokens_per_s: float | None
    """Median over whole answers of their tokens after the first over the time since the first: how fast a reader
    sees one grow; None where no answer had two pieces."""
    ttft: Latency | None
    """Time to first token: from a request's due time to the first piece of its answer."""
    inter_token: Latency | None
    """Time from each piece of an answer to the next, over all answers; a piece is one token except where
    characters or stop strings were held back."""
    e2e: Latency | None
    """From a request's due time to the end of its answer."""
    goodput_per_s: float | None
    """Whole answers that met the SLO, over the duration; None without an SLO."""
    slo_share: float | None
    """Of all requests sent, the share that met the SLO; None without an SLO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """Repetitions of one load on one target."""

    target: str
    conditions: dict[str, Any]
    """All that is needed to run it again, and where it ran."""
    slo: Slo | None
    runs: tuple[RunReport, ...]
    profile: "ProfileReport | None" = None
    """Where the engine's steps went, if somebody asked"""

    def to_json(self) -> dict[str, Any]:
        """Return plain data: what was asked, each repetition, and the median, least and most of each figure."""
        return {**dataclasses.asdict(self), "spread": self._spread()}

    def _spread(self) -> dict[str, dict[str, float]]:
        spread = {}
        for figure in _FIGURES:
            values = figure.values(self.runs)
            if values:
                spread[figure.key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        return spread


def report_run(run: Run, slo: Slo | None) -> RunReport:
    """Return the figures of one repetition."""
    whole = [outcome for outcome in run.outcomes if outcome.error is None]
    num_prompt_tokens = sum(outcome.num_prompt_tokens for outcome in whole)
    num_output_tokens = sum(outcome.num_output_tokens for outcome in whole)
    rates = [outcome.tokens_per_s for outcome in whole if outcome.tokens_per_s is not None]
    num_good = sum(slo.is_met_by(outcome) for outcome in whole) if slo is not None else None
    return RunReport(
        duration_s=run.duration_s,
        num_requests=len(run.outcomes),
        num_whole=len(whole),
        errors=dict(Counter(outcome.error for outcome in run.outcomes if outcome.error is not None)),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        output_tokens_per_s=num_output_tokens / run.duration_s,
        prompt_tokens_per_s=num_prompt_tokens / run.duration_s,
        total_tokens_per_s=(num_prompt_tokens + num_output_tokens) / run.duration_s,
        requests_per_s=len(whole) / run.duration_s,
        stream_tokens_per_s=statistics.median(rates) if rates else None,
        ttft=Latency.of(outcome.ttft_s for outcome in whole if outcome.ttft_s is not None),
        inter_token=Latency.of(gap_s for outcome in whole for gap_s in outcome.gaps_s),
        e2e=Latency.of(outcome.e2e_s for outcome in whole),
        goodput_per_s=None if num_good is None else num_good / run.duration_s,
        slo_share=None if num_good is None else num_good / len(run.outcomes),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the value below which ``percent`` of the ascending ``ordered`` lie, interpolated linearly."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def format_table(report: BenchReport) -> str:
    """Return the report as a table: the median of the repetitions, and their spread where there are several."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(title=report.target, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("figure")
    table.add_column("median" if len(report.runs) > 1 else "value", justify="right")
    if len(report.runs) > 1:
        table.add_column("least", justify="right")
        table.add_column("most", justify="right")
    for figure in _FIGURES:
        values = figure.values(report.runs)
        if not values:
            continue
        shown = [statistics.median(values), min(values), max(values)] if len(report.runs) > 1 else values
        table.add_row(figure.label, *map(figure.show, shown))
    for code, count in sorted(sum((Counter(run.errors) for run in report.runs), Counter[str]()).items()):
        table.add_row(f"errors: {code}", str(count))
    if report.slo is not None:
        table.caption = f"SLO: {report.slo}"
    text = StringIO()
    Console(file=text, width=100, no_color=True).print(table)
    if report.profile is not None:
        from penstock.bench.profile import format_profile

        text.write(f"\n{format_profile(report.profile)}\n")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Figure:
    """One line of the table."""

    key: str
    label: str
    get: Callable[[RunReport], float | None]
    show: Callable[[float], str]

    def values(self, runs: Sequence[RunReport]) -> list[float]:
        """Return the figure of each run that has it."""
        return [value for run in runs if (value := self.get(run)) is not None]


def _rate(value: float) -> str:
    return f"{value:,.1f}"


def _latency_figures(name: str, label: str) -> list[_Figure]:
    def getter(point: str) -> Callable[[RunReport], float | None]:
        def get(run: RunReport) -> float | None:
            latency: Latency | None = getattr(run, name)
            return None if latency is None else getattr(latency, f"{point}_s")

        return get

    return [
        _Figure(key=f"{name}_{point}_s", label=f"{label}, {point}", get=getter(point), show=format_duration)
        for point in ("p50", "p90", "p99")
    ]


_FIGURES = (
    _Figure(key="num_requests", label="requests", get=lambda run: run.num_requests, show="{:,.0f}".format),
    _Figure(key="num_whole", label="whole answers", get=lambda run: run.num_whole, show="{:,.0f}".format),
    _Figure(key="duration_s", label="duration", get=lambda run: run.duration_s, show=format_duration),
    _Figure(key="output_tokens_per_s", label="output tokens/s", get=lambda run: run.output_tokens_per_s, show=_rate),
    _Figure(key="prompt_tokens_per_s", label="prompt tokens/s", get=lambda run: run.prompt_tokens_per_s, show=_rate),
    _Figure(
        key="total_tokens_per_s",
        label="prompt and output tokens/s",
        get=lambda run: run.total_tokens_per_s,
        show=_rate,
    ),
    _Figure(key="requests_per_s", label="requests/s", get=lambda run: run.requests_per_s, show="{:,.2f}".format),
    _Figure(
        key="stream_tokens_per_s",
        label="tokens/s of one answer after its first",
        get=lambda run: run.stream_tokens_per_s,
        show=_rate,
    ),
    *_latency_figures("ttft", "time to first token"),
    *_latency_figures("inter_token", "inter-token latency"),
    *_latency_figures("e2e", "end to end"),
    _Figure(
        key="goodput_per_s",
        label="goodput, requests/s within the SLO",
        get=lambda run: run.goodput_per_s,
        show="{:,.2f}".format,
    ),
    _Figure(key="slo_share", label="share within the SLO", get=lambda run: run.slo_share, show="{:.1%}".format),
)
