"""`penstock bench`: measure a model that is run for it, or a server."""

import asyncio
import contextlib
import json
import os
import platform
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import Progress

from penstock import __version__
from penstock.bench import (
    BenchReport,
    EngineTarget,
    ImageSize,
    LengthRange,
    Run,
    Slo,
    Target,
    UrlTarget,
    Workload,
    format_table,
    repeat,
    report_run,
    require_plots,
    write_plot,
)
from penstock.errors import ConfigError
from penstock.http.client import OpenAIClient
from penstock.launch.settings import Settings

if TYPE_CHECKING:
    from penstock.bench.profile import ProfileReport
    from penstock.engine.profiling import Profiler

_URL_VOCABULARY = range(1000, 2000)
"""Token ids for prompts sent to a server, whose vocabulary is unknown: ordinary tokens of any real one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """The command's options, as typed."""

    target: str | Settings
    """A server's URL, or how to run a model here"""
    model: str | None
    num_requests: int
    concurrency: int | None
    rate_per_s: float | None
    prompt_tokens: str
    output_tokens: str
    num_images: int
    image_size: str
    repetitions: int
    num_warmup: int
    slo: str | None
    seed: int
    as_json: bool
    plot: Path | None
    profile: Path | None
    """Where to write a trace of every step, for a model run here"""


def run_bench(options: BenchOptions) -> int:
    """Measure, print, and return the exit status: 0 if every request was answered, 1 if not."""
    if options.concurrency is not None and options.rate_per_s is not None:
        raise typer.BadParameter("--concurrency and --rate exclude each other; give one")
    try:
        workload = Workload(
            num_requests=options.num_requests,
            prompt_tokens=LengthRange.parse(options.prompt_tokens),
            output_tokens=LengthRange.parse(options.output_tokens),
            concurrency=None if options.rate_per_s else options.concurrency or 32,
            rate_per_s=options.rate_per_s,
            num_images=options.num_images,
            image_size=ImageSize.parse(options.image_size),
            seed=options.seed,
        )
        slo = Slo.parse(options.slo) if options.slo else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if options.plot is not None:
        require_plots()
    profiler = _profiler() if options.profile is not None else None
    runs = asyncio.run(_measure(options, workload, profiler))
    name = options.target if isinstance(options.target, str) else options.target.model.name
    report = BenchReport(
        target=name,
        conditions={
            "penstock": __version__,
            "command": " ".join(["penstock", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "workload": asdict(workload),
        },
        slo=slo,
        runs=tuple(report_run(run, slo) for run in runs),
        profile=_report_profile(profiler, options.profile) if profiler and options.profile else None,
    )
    sys.stdout.write((json.dumps(report.to_json(), indent=2) if options.as_json else format_table(report)) + "\n")
    if options.plot is not None:
        write_plot(options.plot, name, runs)
    return int(any(outcome.error for run in runs for outcome in run.outcomes))


def _profiler() -> "Profiler":
    # Torch comes with it.
    from penstock.engine.profiling import Profiler

    return Profiler()


def _report_profile(profiler: "Profiler", trace: Path) -> "ProfileReport":
    """Return what was recorded against the limits of this moment, and write all of it to ``trace``."""
    from penstock.bench.profile import report_profile, write_trace
    from penstock.kernels.limits import measure_limits

    write_trace(trace, profiler.steps)
    return report_profile(profiler.steps, measure_limits())


async def _measure(options: BenchOptions, workload: Workload, profiler: "Profiler | None") -> list[Run]:
    target = options.target
    async with contextlib.AsyncExitStack() as stack:
        if isinstance(target, str):
            client = OpenAIClient(target, api_key=os.environ.get("OPENAI_API_KEY"))
            await stack.enter_async_context(client)
            driven: Target = UrlTarget(client, options.model or await client.first_model_name())
            vocabulary = list(_URL_VOCABULARY)
        else:
            if options.model is not None:
                raise ConfigError("--model names a server's model, and a model is run here; leave one of them out")
            from penstock.launch.measured import open_measured

            engine = await stack.enter_async_context(open_measured(_for_load(target, workload), profiler))
            driven = EngineTarget(engine)
            vocab_size = engine.model().vocab_size
            vocabulary = random.Random(0).sample(range(vocab_size), min(1000, vocab_size))
        console = Console(stderr=True)
        num_all = options.num_warmup + options.repetitions * workload.num_requests
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("requests", total=num_all)
            return await repeat(
                driven,
                workload,
                vocabulary,
                repetitions=options.repetitions,
                num_warmup=options.num_warmup,
                on_finished=lambda: progress.advance(bar),
                on_warm=lambda: None if profiler is None else profiler.clear(),
            )


def _for_load(settings: Settings, workload: Workload) -> Settings:
    """Return ``settings`` with room for this load's longest request, unless they say how long one may be.

    Else the cache would have to hold what the model was made for, which may be more than the machine has.
    """
    if settings.runner.max_model_tokens is not None:
        return settings
    longest = workload.prompt_tokens.high + workload.output_tokens.high
    return replace(settings, runner=replace(settings.runner, max_model_tokens=longest))
