"""Systems by turns: each start, and each round of each load, one system after the other."""

import contextlib
import dataclasses
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.machine import Bandwidth, busy_s, own_cpu_s
from benchmarks.peers.peer import Limits, NotInstalled, Peer, last_line
from benchmarks.peers.running import DidNotRun, Running
from benchmarks.peers.workloads import LOADS
from penstock.bench import BenchRequest, RunReport, draw_requests, drive, report_run

_WARMUP_REQUESTS = 8
_WARMUP_TOKENS = 256
_WARMUP_ANSWER_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One load, once, on one system."""

    load: str
    round: int
    report: RunReport
    num_pieces_per_token: float
    """1 where each token came by itself; less where the system joins some."""
    read_bytes_per_s: float
    """What the machine read from memory just before."""
    others_cores: float
    """Cores that processes of neither the system nor the load driver kept busy meanwhile."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(kw_only=True, slots=True)
class System:
    """A peer in one precision, and what was measured of it."""

    peer: Peer
    precision: str
    environment: Path
    version: str | None = None
    failure: str | None = None
    """Why it was not measured, or not to the end."""
    prepared: Path | None = None
    cold_start_s: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.peer.name} {self.precision}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "version": self.version,
            "install": self.peer.install,
            "failure": self.failure,
            "cold_start_s": self.cold_start_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "turns": [turn.to_json() for turn in self.turns],
        }


def prepare(system: System, model: Path, prepared: Path) -> None:
    """Convert ``model`` to what ``system`` reads, unless that was done. Raises NotInstalled or DidNotRun."""
    system.version = system.peer.version(system.environment)
    system.prepared = prepared
    unfinished = prepared.with_name(f"{prepared.name}.unfinished")
    if prepared.exists():
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for command in system.peer.prepare(system.environment, system.precision, model, unfinished):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise DidNotRun(f"converting the model failed: {last_line(done.stderr)}")
    unfinished.rename(prepared)


async def measure(
    systems: Sequence[System],
    *,
    model: Path,
    home: Path,
    loads: Sequence[str],
    rounds: int,
    starts: int,
    token_ids: range,
    limits: Limits,
) -> None:
    """Measure all ``systems`` and write what came of it into them. What fails is noted and left out from then on."""
    for system in systems:
        try:
            prepare(system, model, home / "prepared" / model.name / system.name.replace(" ", "-"))
        except (NotInstalled, DidNotRun) as error:
            system.failure = f"{'not installed: ' * isinstance(error, NotInstalled)}{error}"
            print(f"{system.name}: {system.failure}", flush=True)

    def start(system: System) -> Running:
        assert system.prepared is not None
        launch = system.peer.launch(system.environment, system.precision, model, system.prepared, limits)
        return Running(launch, home / "logs" / f"{system.name.replace(' ', '-')}.log")

    (home / "logs").mkdir(exist_ok=True)
    for number in range(starts - 1):
        # In either order: memory that nobody used for some seconds is slow to come back on a virtual machine, and the
        # first that takes it waits for it.
        for system in (system for system in systems[:: 1 - 2 * (number % 2)] if system.failure is None):
            with _noting(system):
                async with start(system) as running:
                    system.cold_start_s.append(running.cold_start_s)
                    print(f"start {number}: {system.name} {running.cold_start_s:.2f} s", flush=True)

    bandwidth = Bandwidth(limits.threads)
    async with contextlib.AsyncExitStack() as stack:
        alive: list[tuple[System, Running]] = []
        for system in (system for system in systems if system.failure is None):
            with _noting(system):
                running = await stack.enter_async_context(start(system))
                system.cold_start_s.append(running.cold_start_s)
                alive.append((system, running))
                running.rest()
                print(f"last start: {system.name} {running.cold_start_s:.2f} s", flush=True)
        try:
            # Round -1 warms up and is dropped: it finds caches cold and memory untouched.
            for load, number, (system, running) in itertools.product(loads, range(-1, rounds), alive):
                if system.failure is not None:
                    continue
                with _noting(system):
                    running.wake()
                    turn = await _take_turn(running, load, number, token_ids, bandwidth)
                    running.rest()
                    if number >= 0:
                        system.turns.append(turn)
                        figure = f"{LOADS[load].figures[0].get(turn.report):.1f}"
                        others = f"others kept {turn.others_cores:.1f} cores busy"
                        print(f"{load} {number}: {system.name} {figure}; {others}", flush=True)
        finally:
            for system, running in alive:
                system.peak_memory_bytes = running.peak_memory_bytes


async def _take_turn(running: Running, load: str, number: int, token_ids: range, bandwidth: Bandwidth) -> Turn:
    workload = LOADS[load].workload
    requests = draw_requests(workload, token_ids, repetition=number)
    if number < 0:
        requests = [_shortened(request) for request in requests[:_WARMUP_REQUESTS]]
    read_bytes_per_s = bandwidth.measure()
    began, busy, own = time.perf_counter(), busy_s(), running.cpu_s + own_cpu_s()
    run = await drive(running.target, requests, concurrency=workload.concurrency, name=f"{load}{number}")
    elapsed_s = time.perf_counter() - began
    others_s = (busy_s() - busy) - (running.cpu_s + own_cpu_s() - own)
    report = report_run(run, None)
    if report.errors:
        raise DidNotRun(f"load ({load}): {report.errors}")
    return Turn(
        load=load,
        round=number,
        report=report,
        num_pieces_per_token=sum(len(outcome.piece_s) for outcome in run.outcomes) / report.num_output_tokens,
        read_bytes_per_s=read_bytes_per_s,
        others_cores=max(0.0, others_s / elapsed_s),
    )


def _shortened(request: BenchRequest) -> BenchRequest:
    prompt = request.prompt_token_ids[:_WARMUP_TOKENS]
    return dataclasses.replace(request, prompt_token_ids=prompt, num_output_tokens=_WARMUP_ANSWER_TOKENS)


@contextlib.contextmanager
def _noting(system: System) -> Iterator[None]:
    """Turn a failure of ``system`` into its note."""
    try:
        yield
    except DidNotRun as error:
        system.failure = str(error)
        print(f"{system.name}: {error}", flush=True)
