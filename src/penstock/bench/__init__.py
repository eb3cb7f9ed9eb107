"""Measure an engine or a server: what goes in, how it is driven, what came out."""

from penstock.bench.load import EngineTarget, Outcome, Run, Target, UrlTarget, drive, repeat
from penstock.bench.plot import require_plots, write_plot
from penstock.bench.report import BenchReport, Latency, RunReport, Slo, format_table, report_run
from penstock.bench.workload import BenchRequest, ImageSize, LengthRange, Workload, draw_requests

__all__ = [
    "BenchReport",
    "BenchRequest",
    "EngineTarget",
    "ImageSize",
    "Latency",
    "LengthRange",
    "Outcome",
    "Run",
    "RunReport",
    "Slo",
    "Target",
    "UrlTarget",
    "Workload",
    "draw_requests",
    "drive",
    "format_table",
    "repeat",
    "report_run",
    "require_plots",
    "write_plot",
]
