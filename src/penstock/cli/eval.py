"""`penstock eval`: how well a model does, and whether it is near enough to another."""

import asyncio
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from penstock import __version__
from penstock.eval import (
    DEFAULT_THRESHOLDS,
    EvalReport,
    PerplexityTask,
    Side,
    SpeedReport,
    Subject,
    Task,
    TaskReport,
    Thresholds,
    closeness,
    judge,
    load_tasks,
    measure_speed,
    report_closeness,
    report_tasks,
    require_same_windows,
    run_tasks,
    side_of,
)
from penstock.eval.report import format_report
from penstock.eval.result import ClosenessReport
from penstock.eval.tasks import OnItem
from penstock.launch.engine import find_model, load_bare_model
from penstock.launch.measured import open_measured
from penstock.launch.settings import Settings
from penstock.launch.text import load_template, load_tokenizer

CLOSENESS_WINDOWS = 16
"""Windows of the first text that KL, agreement and layers' errors are taken on: plenty of tokens, and bounded time."""
_REQUEST_TOKENS = 4096
"""What a request may hold at least, where the model can; else the cache would have to hold what it was made for."""
FAILED_VERDICT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """The command's options, as typed."""

    candidate: Settings
    reference: Settings | None
    tasks: Sequence[str]
    window: int
    limit: int | None
    within: str | None
    has_speed: bool
    seed: int
    as_json: bool
    out: Path | None


def run_eval(options: EvalOptions) -> int:
    """Evaluate, print, and return the exit status: 0, or 3 if there is a verdict and it fails."""
    tasks = load_tasks(options.tasks, window=options.window)
    thresholds = _thresholds(options, tasks)
    with _progress() as progress:
        sides, reports, speed = asyncio.run(_ask_engines(options, tasks, progress))
        close = _compare_models(options, tasks, progress)
    report = EvalReport(
        conditions={
            "penstock": __version__,
            "command": " ".join(["penstock", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "window": options.window,
            "limit": options.limit,
            "seed": options.seed,
        },
        candidate=sides[0],
        reference=sides[1] if len(sides) > 1 else None,
        tasks=reports,
        closeness=close,
        speed=speed,
        verdict=None if options.reference is None else judge(thresholds, reports, close, speed),
    )
    sys.stdout.write((json.dumps(report.to_json(), indent=2) if options.as_json else format_report(report)) + "\n")
    return FAILED_VERDICT if report.verdict is not None and not report.verdict.passed else 0


def _thresholds(options: EvalOptions, tasks: Sequence[Task]) -> Thresholds:
    """Return what the verdict goes by. Raises BadParameter for what could not be judged, before anything is run."""
    if options.reference is None:
        if options.within is not None:
            raise typer.BadParameter("--within is for a comparison; name the reference with --against")
        return DEFAULT_THRESHOLDS
    try:
        thresholds = Thresholds.parse(options.within) if options.within is not None else DEFAULT_THRESHOLDS
    except ValueError as error:
        raise typer.BadParameter(f"--within: {error}") from error
    kinds = [task.kind for task in tasks]
    unmet = thresholds.unmet_needs(kinds, has_closeness="perplexity" in kinds, has_speed=options.has_speed)
    if unmet:
        raise typer.BadParameter(
            f"nothing would be measured to hold {', '.join(unmet)} against: loss, kl and agreement need a text among "
            "the tasks, score a task of questions, speed no --no-speed; choose other thresholds with --within"
        )
    return thresholds


async def _ask_engines(
    options: EvalOptions, tasks: Sequence[Task], progress: Progress
) -> tuple[list[Side], tuple[TaskReport, ...], SpeedReport | None]:
    """Run what goes through engines: every task on each side, and speed by turns."""
    all_settings = [options.candidate] if options.reference is None else [options.candidate, options.reference]
    async with contextlib.AsyncExitStack() as stack:
        subjects = []
        for settings in all_settings:
            client = await stack.enter_async_context(
                open_measured(_for_tasks(settings, options.window, len(all_settings)))
            )
            subjects.append(Subject(client, load_tokenizer(settings.model), load_template(settings.model)))
        sides = [side_of(subject.client.model()) for subject in subjects]
        if len(subjects) > 1:
            require_same_windows(tasks, *subjects)
        tables = []
        for side, subject in zip(sides, subjects, strict=True):
            on_task = _TaskBars(progress, side.label)
            tables.append(await run_tasks(tasks, subject, limit=options.limit, on_task=on_task))
        reports = report_tasks(tasks, tables[0], tables[1] if len(tables) > 1 else None, seed=options.seed)
        speed = None
        if options.has_speed:
            clients = [subject.client for subject in subjects]
            speed = await measure_speed(clients, on_item=_TaskBars(progress, "by turns")("speed"))
        return sides, reports, speed


def _compare_models(options: EvalOptions, tasks: Sequence[Task], progress: Progress) -> ClosenessReport | None:
    """Load both models without engines and see how far they are apart on the first text."""
    texts = [task for task in tasks if isinstance(task, PerplexityTask)]
    if options.reference is None or not texts:
        return None
    most = min(options.limit or CLOSENESS_WINDOWS, CLOSENESS_WINDOWS)
    windows = texts[0].windows(load_tokenizer(options.reference.model)).windows[:most]
    candidate, reference = load_bare_model(options.candidate), load_bare_model(options.reference)
    found = closeness(candidate, reference, windows, _TaskBars(progress, "both")("closeness"))
    return report_closeness(texts[0].name, found, seed=options.seed)


def _for_tasks(settings: Settings, window: int, num_engines: int) -> Settings:
    """Return ``settings`` for one of ``num_engines`` side by side, with room for the tasks' longest request."""
    cache = replace(settings.cache, memory_share=settings.cache.memory_share / num_engines)
    runner = settings.runner
    if runner.max_model_tokens is None:
        config, _ = find_model(settings.model)
        runner = replace(runner, max_model_tokens=min(config.max_positions, max(window, _REQUEST_TOKENS)))
    return replace(settings, cache=cache, runner=runner)


class _TaskBars:
    """A bar for each task of one side."""

    def __init__(self, progress: Progress, side: str) -> None:
        self._progress = progress
        self._side = side

    def __call__(self, task: str) -> OnItem:
        """Add a bar and return what advances it."""
        bar = self._progress.add_task(f"{task} ({self._side})", total=None)
        return lambda num_done, num_all: self._progress.update(bar, completed=num_done, total=num_all)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield progress
