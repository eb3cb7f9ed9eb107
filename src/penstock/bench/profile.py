"""Turn profiled steps into a table against the machine's limits, and into a trace for Perfetto or chrome://tracing."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.engine.profiling import ProfiledStep, Span
from penstock.kernels.limits import Limits
from penstock.units import counted, format_duration


@dataclass(frozen=True, kw_only=True, slots=True)
class PartReport:
    """One part of a kind of step, over all steps of that kind."""

    part: str
    calls_per_step: float
    mean_s: float
    """Seconds a step spends on it"""
    share: float
    """Of the steps' time"""
    bytes_per_s: float | None
    """None where nobody counted what was moved and computed, here and in the next two"""
    ops_per_s: float | None
    floor_share: float | None
    """What moving or computing takes at least, over what it took; above one where data was in a processor's cache"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsReport:
    """Steps of one kind."""

    kind: str
    """decode: every sequence had one token to compute; prefill: some had more"""
    num_steps: int
    mean_tokens: float
    mean_s: float
    floor_share: float
    parts: tuple[PartReport, ...]
    """The longest first"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileReport:
    """Where the steps of a run went."""

    limits: Limits
    kinds: tuple[StepsReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def report_profile(steps: Sequence[ProfiledStep], limits: Limits) -> ProfileReport:
    """Return where ``steps`` went, decodes and prefills apart."""
    kinds = (("decode", [step for step in steps if step.is_decode]), ("prefill", [s for s in steps if not s.is_decode]))
    return ProfileReport(limits=limits, kinds=tuple(_report_kind(kind, some, limits) for kind, some in kinds if some))


def _report_kind(kind: str, steps: Sequence[ProfiledStep], limits: Limits) -> StepsReport:
    by_part: dict[str, list[Span]] = {}
    for step in steps:
        for span in step.spans:
            by_part.setdefault(span.part, []).append(span)
    total_s = sum(_seconds(span) for spans in by_part.values() for span in spans)
    floor_s = sum(
        limits.floor_s(span.num_bytes, span.num_ops, of=span.of) for spans in by_part.values() for span in spans
    )
    parts = [_report_part(part, spans, len(steps), total_s, limits) for part, spans in by_part.items()]
    return StepsReport(
        kind=kind,
        num_steps=len(steps),
        mean_tokens=sum(step.num_tokens for step in steps) / len(steps),
        mean_s=total_s / len(steps),
        floor_share=floor_s / total_s,
        parts=tuple(sorted(parts, key=lambda report: -report.mean_s)),
    )


def _report_part(part: str, spans: Sequence[Span], num_steps: int, total_s: float, limits: Limits) -> PartReport:
    part_s = sum(map(_seconds, spans))
    num_bytes, num_ops = sum(span.num_bytes for span in spans), sum(span.num_ops for span in spans)
    floor_s = sum(limits.floor_s(span.num_bytes, span.num_ops, of=span.of) for span in spans)
    return PartReport(
        part=part,
        calls_per_step=len(spans) / num_steps,
        mean_s=part_s / num_steps,
        share=part_s / total_s,
        bytes_per_s=num_bytes / part_s if num_bytes else None,
        ops_per_s=num_ops / part_s if num_bytes else None,
        floor_share=floor_s / part_s if num_bytes else None,
    )


def _seconds(span: Span) -> float:
    # A nanosecond at least, so that every rate is a number.
    return max(span.ended_ns - span.began_ns, 1) / 1e9


def format_profile(report: ProfileReport) -> str:
    """Return the report as a table for each kind of step."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    limits, text = report.limits, StringIO()
    console = Console(file=text, width=100, no_color=True)
    console.print(
        f"measured limits: reads {limits.read_bytes_per_s / 1e9:,.1f} GB/s, "
        f"multiply-adds of float32 {limits.flops_per_s / 1e9:,.0f} Gop/s, "
        f"of bfloat16 {limits.bfloat16_ops_per_s / 1e9:,.0f}, of bytes {limits.byte_ops_per_s / 1e9:,.0f}",
        soft_wrap=True,
    )
    for steps in report.kinds:
        title = (
            f"\n{steps.kind}: {counted(steps.num_steps, 'step')} of {steps.mean_tokens:,.1f} tokens, "
            f"{format_duration(steps.mean_s)} each, {steps.floor_share:.0%} of the floor"
        )
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("part")
        for heading in ("calls a step", "time a step", "share", "GB/s", "Gop/s", "of the floor"):
            table.add_column(heading, justify="right")
        for part in steps.parts:
            table.add_row(
                part.part,
                f"{part.calls_per_step:,.4g}",
                format_duration(part.mean_s),
                f"{part.share:.1%}",
                "" if part.bytes_per_s is None else f"{part.bytes_per_s / 1e9:,.1f}",
                "" if part.ops_per_s is None else f"{part.ops_per_s / 1e9:,.1f}",
                "" if part.floor_share is None else f"{part.floor_share:.0%}",
            )
        console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def write_trace(file: Path, steps: Sequence[ProfiledStep]) -> None:
    """Write ``steps`` to ``file`` in Chrome's trace event format: one row of steps above one of their parts."""
    began_ns = steps[0].spans[0].began_ns if steps else 0
    events: list[dict[str, Any]] = []

    def add(name: str, row: int, first_ns: int, last_ns: int, facts: dict[str, Any]) -> None:
        event = {"name": name, "ph": "X", "pid": 1, "tid": row, "ts": (first_ns - began_ns) / 1e3}
        events.append(event | {"dur": (last_ns - first_ns) / 1e3, "args": facts})

    for step in steps:
        facts = {"tokens": step.num_tokens, "sequences": step.num_sequences}
        name = "decode" if step.is_decode else "prefill"
        add(name, 1, step.spans[0].began_ns, step.spans[-1].ended_ns, facts)
        for span in step.spans:
            work = {"bytes": span.num_bytes, "ops": span.num_ops} if span.num_bytes else {}
            add(span.part, 2, span.began_ns, span.ended_ns, work)
    for row, title in ((1, "steps"), (2, "parts")):
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": title}})
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
