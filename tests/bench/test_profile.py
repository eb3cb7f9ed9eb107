"""From spans to a table and a trace."""

import json
from pathlib import Path

import pytest

from penstock.bench.profile import format_profile, report_profile, write_trace
from penstock.engine.profiling import ProfiledStep, Span
from penstock.kernels.limits import Limits, measure_limits

LIMITS = Limits(read_bytes_per_s=1e9, flops_per_s=2e9, bfloat16_ops_per_s=3e9, byte_ops_per_s=4e9)
MS = 1_000_000
DECODE = ProfiledStep(
    num_tokens=2,
    num_sequences=2,
    spans=[
        Span("schedule", 0, 1 * MS, 0, 0),
        Span("qkv", 1 * MS, 5 * MS, 2_000_000, 1_000_000),  # 2 ms of reading
        Span("qkv", 5 * MS, 9 * MS, 1_000_000, 6_000_000),  # 3 ms of computing
        Span("output", 9 * MS, 10 * MS, 0, 0),
    ],
)
PREFILL = ProfiledStep(num_tokens=9, num_sequences=2, spans=[Span("schedule", 10 * MS, 12 * MS, 0, 0)])


def test_kinds_of_steps_are_told_apart_and_held_against_the_floor() -> None:
    decode, prefill = report_profile([DECODE, DECODE, PREFILL], LIMITS).kinds
    assert (decode.kind, decode.num_steps, decode.mean_tokens) == ("decode", 2, 2)
    assert decode.mean_s == pytest.approx(0.010)
    assert decode.floor_share == pytest.approx(5 / 10)
    first, *rest = decode.parts
    assert first.part == "qkv"
    assert (first.calls_per_step, first.mean_s, first.share) == pytest.approx((2, 0.008, 0.8))
    assert first.floor_share == pytest.approx(5 / 8)
    assert first.bytes_per_s == pytest.approx(3e6 / 0.008)
    assert first.ops_per_s == pytest.approx(7e6 / 0.008)
    assert {part.part: part.floor_share for part in rest} == {"schedule": None, "output": None}
    assert (prefill.kind, prefill.num_steps) == ("prefill", 1)


def test_the_table_names_limits_and_parts() -> None:
    report = report_profile([DECODE, PREFILL], LIMITS)
    table = format_profile(report)
    assert "reads 1.0 GB/s" in table
    assert "decode: 1 step of 2.0 tokens, 10 ms each, 50% of the floor" in table
    line = next(line for line in table.splitlines() if line.startswith("qkv"))
    assert line.split() == ["qkv", "2", "8", "ms", "80.0%", "0.4", "0.9", "62%"]
    assert json.loads(json.dumps(report.to_json()))["limits"]["flops_per_s"] == 2e9


def test_the_trace_has_an_event_for_each_step_and_part(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    write_trace(file, [DECODE, PREFILL])
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    assert [event["name"] for event in events if event["tid"] == 1] == ["decode", "prefill"]
    qkv = [event for event in events if event["name"] == "qkv"]
    assert [(event["ts"], event["dur"]) for event in qkv] == [(1000, 4000), (5000, 4000)]
    assert qkv[0]["args"] == {"bytes": 2_000_000, "ops": 1_000_000}


def test_limits_are_a_machines() -> None:
    limits = measure_limits()
    assert 1e8 < limits.read_bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s < 1e15
    assert 1e8 < limits.bfloat16_ops_per_s < 1e16
    assert 1e8 < limits.byte_ops_per_s < 1e16
    assert limits.floor_s(limits.read_bytes_per_s, 0) == pytest.approx(1)
    assert limits.floor_s(0, limits.byte_ops_per_s, of="bytes") == pytest.approx(1)
