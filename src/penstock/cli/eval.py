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
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from penstock import __version__
from penstock.eval import (
    DEFAULT_THRESHOLDS,
    EvalReport,
    PerplexityTask,
    PrefixReuse,
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
    prefix_reuse,
    report_closeness,
    report_tasks,
    require_same_windows,
    run_tasks,
    side_of,
)
from penstock.eval.report import Point, format_report, prepare_directory, read_points, write_reports
from penstock.eval.result import ClosenessReport, SettingReport
from penstock.eval.tasks import OnItem
from penstock.launch.engine import find_model, load_bare_model
from penstock.launch.images import load_images
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
    decode_settings: bool
    """Compare settings of the candidate's decoding, instead of all else"""
    seed: int
    as_json: bool
    out: Path | None
    beside: Sequence[Path]
    """Earlier report.json whose models the Pareto plot shows as well"""


def run_eval(options: EvalOptions) -> int:
    """Evaluate, print, and return the exit status: 0, or 3 if there is a verdict and it fails."""
    tasks = load_tasks(options.tasks, window=options.window)
    thresholds = _thresholds(options, tasks)
    beside = _read_beside(options, tasks)
    if options.out is not None:
        prepare_directory(options.out)
    with _progress() as progress:
        if options.decode_settings:
            report = _compare_decode_settings(options, tasks, progress)
        else:
            sides, reports, speed = asyncio.run(_ask_engines(options, tasks, progress))
            close = _compare_models(options, tasks, progress)
            report = EvalReport(
                conditions=_conditions(options),
                candidate=sides[0],
                reference=sides[1] if len(sides) > 1 else None,
                tasks=reports,
                closeness=close,
                speed=speed,
                verdict=None if options.reference is None else judge(thresholds, reports, close, speed),
            )
    sys.stdout.write((json.dumps(report.to_json(), indent=2) if options.as_json else format_report(report)) + "\n")
    if options.out is not None:
        loss_bound = thresholds.loss if options.reference is not None else None
        for file in write_reports(report, options.out, beside=beside, loss_bound=loss_bound):
            sys.stderr.write(f"wrote {file}\n")
    return FAILED_VERDICT if report.verdict is not None and not report.verdict.passed else 0


def _read_beside(options: EvalOptions, tasks: Sequence[Task]) -> list[Point]:
    texts = [task for task in tasks if isinstance(task, PerplexityTask)]
    if options.beside and (options.out is None or not texts):
        raise typer.BadParameter("--beside is for the plot that --out draws of a text; give --out and a --task of text")
    return [
        point
        for file in options.beside
        for point in read_points(file, data_sha256=texts[0].data_sha256, limit=options.limit)
    ]


def _conditions(options: EvalOptions) -> dict[str, Any]:
    return {
        "penstock": __version__,
        "command": " ".join(["penstock", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "window": options.window,
        "limit": options.limit,
        "seed": options.seed,
    }


def _thresholds(options: EvalOptions, tasks: Sequence[Task]) -> Thresholds:
    """Return what the verdict goes by. Raises BadParameter for what could not be judged, before anything is run."""
    if options.reference is not None and options.decode_settings:
        raise typer.BadParameter("--decode-settings compares a model with itself; leave --against out")
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
        subjects = [await _open(stack, settings, options, len(all_settings)) for settings in all_settings]
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


def _compare_decode_settings(options: EvalOptions, tasks: Sequence[Task], progress: Progress) -> EvalReport:
    """See what the cache's dtype and the reuse of prefixes change in the candidate, on the first text."""
    settings = options.candidate
    texts = [task for task in tasks if isinstance(task, PerplexityTask)]
    if not texts:
        raise typer.BadParameter("--decode-settings compares on a text, and no --task is one; leave --task out")
    cut = texts[0].windows(load_tokenizer(settings.model))
    windows = cut.windows[: min(options.limit or CLOSENESS_WINDOWS, CLOSENESS_WINDOWS)]

    async def reuse() -> tuple[Side, PrefixReuse]:
        async with contextlib.AsyncExitStack() as stack:
            subjects = [
                await _open(stack, replace(settings, cache=replace(settings.cache, prefix_caching=on)), options, 2)
                for on in (True, False)
            ]
            bar = _TaskBars(progress, "on and off")("prefix reuse")
            found = await prefix_reuse(subjects[0], subjects[1], windows, bar)
            return side_of(subjects[0].client.model()), found

    side, reused = asyncio.run(reuse())
    exact, coded = (
        load_bare_model(replace(settings, runner=replace(settings.runner, kv_dtype=kv_dtype)))
        for kv_dtype in ("auto", "int8")
    )
    found = closeness(coded, exact, windows, _TaskBars(progress, "int8 and exact")("cache"))
    reports = (
        SettingReport(
            setting=f"keys and values in int8 instead of {exact.kv_dtype}",
            closeness=report_closeness(texts[0].name, found, seed=options.seed),
        ),
        SettingReport(
            setting="prefixes reused instead of computed",
            closeness=report_closeness(texts[0].name, reused.closeness, seed=options.seed),
            num_reused_tokens=reused.num_reused_tokens,
            largest_difference=reused.largest_difference,
        ),
    )
    return EvalReport(conditions=_conditions(options), candidate=side, reference=None, tasks=(), settings=reports)


async def _open(
    stack: contextlib.AsyncExitStack, settings: Settings, options: EvalOptions, num_engines: int
) -> Subject:
    """Run a model beside ``num_engines - 1`` others until ``stack`` is closed."""
    client = await stack.enter_async_context(open_measured(_for_tasks(settings, options.window, num_engines)))
    images = load_images(settings.model, settings.images)
    return Subject(client, load_tokenizer(settings.model), load_template(settings.model), images)


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
