"""An evaluation as one HTML page that needs nothing else."""

from collections.abc import Iterator, Sequence
from html import escape

from penstock.eval.report.plots import differences_svg, layers_svg, pareto_svg
from penstock.eval.report.points import Point, points_of
from penstock.eval.report.words import (
    closeness_rows,
    pace_rows,
    show_check,
    show_load,
    show_side,
    show_spread,
    show_verdict,
    task_headers,
    task_rows,
)
from penstock.eval.result import ClosenessReport, EvalReport, SpeedReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.PASS { color: #17692d; } .FAIL { color: #a8201a; }
svg { max-width: 100%; height: auto; }
code { background: #f3f4f6; padding: .1rem .3rem; overflow-wrap: anywhere; }
footer { color: #666; font-size: 13px; margin-top: 2rem; }
"""


def html_page(report: EvalReport, beside: Sequence[Point] = (), *, loss_bound: float | None = None) -> str:
    """Return the page; ``beside`` are models of earlier reports for the Pareto plot. Raises ``MissingExtra``."""
    title = report.candidate.label + (f" against {report.reference.label}" if report.reference else "")
    body = "\n".join(_body(report, beside, loss_bound))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _body(report: EvalReport, beside: Sequence[Point], loss_bound: float | None) -> Iterator[str]:
    if report.verdict is not None:
        word = show_verdict(report.verdict)
        yield f'<h2>Verdict: <span class="{word}">{word}</span></h2>'
        yield _list(f"{'ok' if check.passed else 'not'}: {show_check(check)}" for check in report.verdict.checks)
    sides = [("candidate", report.candidate)] + ([("reference", report.reference)] if report.reference else [])
    yield _table(["", "model"], [[role, show_side(side)] for role, side in sides], num_text=2)
    if report.tasks:
        yield "<h2>Tasks</h2>"
        with_reference = report.reference is not None
        yield _table(task_headers(with_reference=with_reference), task_rows(report.tasks), num_text=2)
        if with_reference:
            yield differences_svg(report.tasks, loss_bound)
    for setting in report.settings:
        yield f"<h2>{escape(setting.setting.capitalize())}</h2>"
        yield from _closeness(setting.closeness)
        if setting.num_reused_tokens is not None and setting.largest_difference is not None:
            yield (
                f"<p>{setting.num_reused_tokens:,} prompt tokens were reused; no token's log-likelihood differs by "
                f"more than {setting.largest_difference:.3g} nats.</p>"
            )
    own = points_of(report)
    if own:
        yield "<h2>Size, speed and loss</h2>"
        # The same reference stands in many reports.
        others = {point.label: point for point in beside if point.label not in {one.label for one in own}}
        yield pareto_svg([*own, *others.values()], len(own))
    if report.speed is not None:
        yield _speed(report.speed)
    if report.closeness is not None:
        yield "<h2>Distance from the reference</h2>"
        yield from _closeness(report.closeness)
    rows = [[key, str(value)] for key, value in report.conditions.items() if value is not None]
    rows += [[f"data of {task.name}", f"sha256 {task.data_sha256}"] for task in report.tasks]
    yield "<h2>Conditions</h2>" + _table(["", ""], rows, num_text=2)
    yield (
        "<footer>In brackets: 95% intervals, bootstrapped over items (percentiles of 2,000 resamples), both models on "
        "the same ones. A text is read in windows side by side; all tokens of each but its first are predicted."
        "</footer>"
    )


def _closeness(found: ClosenessReport) -> Iterator[str]:
    yield _table([f"on {found.num_tokens:,} tokens of {found.text}", ""], closeness_rows(found), num_text=1)
    if found.layer_errors is not None:
        yield layers_svg(found.layer_errors)


def _speed(speed: SpeedReport) -> str:
    rows = pace_rows(speed)
    if speed.tokens_per_s_ratio is not None:
        rows.append(["ratio, each round", show_spread(speed.tokens_per_s_ratio), ""])
    table = _table(["", "tokens/s after the first", "first token"], rows, num_text=1)
    return f"{table}<p>Speed: {show_load(speed)}.</p>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, num_text: int) -> str:
    """Return a table whose first ``num_text`` columns are text and the others numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = ["" if i < num_text else ' class="n"' for i in range(len(values))]
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    head = f"<tr>{cells('th', headers)}</tr>" if any(headers) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _list(lines: Iterator[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
