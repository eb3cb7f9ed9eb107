"""Emitting what happens: structured logs and bounded metric labels. Judging it is for others."""

from penstock.telemetry.labels import BoundedLabels
from penstock.telemetry.logs import configure_logging, get_logger

__all__ = ["BoundedLabels", "configure_logging", "get_logger"]
