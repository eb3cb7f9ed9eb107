"""An evaluation on paper: each form beside the others."""

from penstock.eval.report.table import format_report

__all__ = ["format_report"]
