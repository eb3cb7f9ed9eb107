"""An engine to be measured."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from penstock.engine.process import ProcessClient
from penstock.launch import process, worker
from penstock.launch.settings import Settings
from penstock.protocol import EngineClient
from penstock.telemetry import configure_logging

if TYPE_CHECKING:
    from penstock.engine.profiling import Profiler


@asynccontextmanager
async def open_measured(settings: Settings, profiler: "Profiler | None" = None) -> AsyncIterator[EngineClient]:
    """Run a model until the block ends, in a process of its own as ``serve`` does.

    In this one, whoever drives it would hold the interpreter's lock for a part of each step; with a ``profiler`` to
    watch it there is no other way. Raises ``ConfigError`` if it cannot be run.
    """
    configure_logging("warning")
    client = _own_process(settings) if profiler is None else _this_process(settings, profiler)
    try:
        await client.start()
        yield client
    finally:
        await client.stop()


def _own_process(settings: Settings) -> EngineClient:
    quiet = replace(settings, log=replace(settings.log, level="warning"))
    return ProcessClient(process.command(), worker.payload(quiet))


def _this_process(settings: Settings, profiler: "Profiler") -> EngineClient:
    # Torch comes with it.
    from penstock.engine.aio import InProcessClient
    from penstock.launch.engine import build_engine

    return InProcessClient(lambda: profiler.around_engine(build_engine(settings, profiler)))
