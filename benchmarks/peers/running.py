"""A started system: its processes, how to ask it for tokens, what memory it took."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.peers.peer import REPOSITORY, Launch, last_line
from penstock.bench import BenchRequest, Target, UrlTarget
from penstock.errors import PenstockError, UnavailableError
from penstock.http.client import OpenAIClient

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.01


class DidNotRun(Exception):
    """A system could not be started or measured; the message says why."""


class Running:
    """A system's process tree. Use as an async context manager; inside it the first token has been produced."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self._launch = launch
        self._log = log
        self._stack = contextlib.AsyncExitStack()
        self.target: Target
        self.cold_start_s: float
        """From starting the process to the first piece of a first answer."""

    async def __aenter__(self) -> Self:
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._launch.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if self._launch.port is None else log,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, **self._launch.environment},
                start_new_session=True,
            )
        try:
            if self._launch.port is None:
                self.target = await self._stack.enter_async_context(LinesTarget(self._process))
            else:
                client = OpenAIClient(f"http://127.0.0.1:{self._launch.port}")
                await self._stack.enter_async_context(client)
                self.target = HttpTarget(client, self._launch.body)
            self.cold_start_s = await self._first_token() - began
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def _first_token(self) -> float:
        """Ask until a first piece comes, and return when it came. Raises DidNotRun."""
        request = BenchRequest(prompt_token_ids=tuple(range(300, 308)), num_output_tokens=2, arrival_s=0.0)
        deadline = time.perf_counter() + _START_TIMEOUT_S
        while True:
            came: list[float] = []
            try:
                await self.target.generate(request, "first", lambda came=came: came.append(time.perf_counter()))  # type: ignore[misc]
                return came[0]
            except PenstockError as error:
                if self._process.returncode is not None or self._launch.port is None:
                    raise DidNotRun(f"did not start: {self._last_words()}") from error
                if time.perf_counter() > deadline:
                    raise DidNotRun(f"no token within {_START_TIMEOUT_S:.0f} s: {error}") from error
            await asyncio.sleep(_POLL_S)

    def _last_words(self) -> str:
        return last_line(self._log.read_text(errors="replace"))

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident memory of all its processes."""
        return sum(self.peaks_bytes)

    @property
    def peaks_bytes(self) -> list[int]:
        """Peak resident memory of each process, the first started first; what several have of a file counts once.

        The system keeps no peak of that; what was shared at the peak is taken to be what is shared now. What strangers
        have mapped as well counts in full: the more of them run torch, the smaller would be a share of it.
        """
        peaks: list[int] = []
        counted: dict[str, int] = {}
        for process in self._processes():
            mapped = _mapped_bytes(process)
            shared = sum(min(num_bytes, counted.get(name, 0)) for name, num_bytes in mapped.items())
            peaks.append(_memory_bytes(process, "VmHWM") - shared)
            counted |= {name: max(num_bytes, counted.get(name, 0)) for name, num_bytes in mapped.items()}
        return peaks

    @property
    def cpu_s(self) -> float:
        """Processor time its processes have used."""
        total = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def rest(self) -> None:
        """Stop its processes where they are: some systems poll for requests, which takes a core from who has a turn."""
        self._send(signal.SIGSTOP)

    def wake(self) -> None:
        """Let them go on."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    async def _stop(self) -> None:
        self.wake()
        # Its whole process group, which start_new_session made, and helpers that left it: none may outlive the rest.
        processes = self._processes()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await self._stack.aclose()


class HttpTarget:
    """A server's ``/v1/completions``, greedy and streamed; a piece is an event that carries text."""

    def __init__(self, client: OpenAIClient, body: Mapping[str, Any]) -> None:
        self._client = client
        self._body = body
        self._target: UrlTarget | None = None

    async def generate(self, request: BenchRequest, request_id: str, on_piece: Callable[[], None]) -> int:
        """Return the tokens the server says it generated. Asks once more where nothing came of the first time.

        Servers close connections they have kept open for some time or requests (llama.cpp's does), and a request
        that meets such a moment is lost; the time it took still counts.
        """
        num_pieces = 0

        def on_counted_piece() -> None:
            nonlocal num_pieces
            num_pieces += 1
            on_piece()

        try:
            return await self._ask(request, request_id, on_counted_piece)
        except UnavailableError:
            if num_pieces:
                raise
            return await self._ask(request, request_id, on_counted_piece)

    async def _ask(self, request: BenchRequest, request_id: str, on_piece: Callable[[], None]) -> int:
        if self._target is None:
            also = dict(self._body)
            model = also.pop("model", None) or await self._client.first_model_name()
            self._target = UrlTarget(self._client, model, also)
        return await self._target.generate(request, request_id, on_piece)


class LinesTarget:
    """A worker of `workers/`: requests as lines of JSON to it, what each step added as lines back."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._events: dict[str, asyncio.Queue[dict[str, Any] | None]] = {}
        self._has_ended = False

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def generate(self, request: BenchRequest, request_id: str, on_piece: Callable[[], None]) -> int:
        """Return the tokens of all lines."""
        assert self._process.stdin is not None
        events = self._events[request_id] = asyncio.Queue()
        line = {"id": request_id, "prompt": request.prompt_token_ids, "num_tokens": request.num_output_tokens}
        try:
            if self._has_ended:
                raise UnavailableError("the worker has ended")
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            num_tokens = 0
            while True:
                event = await events.get()
                if event is None:
                    raise UnavailableError("the worker has ended")
                if event["num_tokens"]:
                    num_tokens += event["num_tokens"]
                    on_piece()
                if event["finished"]:
                    return num_tokens
        finally:
            del self._events[request_id]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                event = json.loads(line)
                if event["id"] in self._events:
                    self._events[event["id"]].put_nowait(event)
        finally:
            # The exit status first, for whoever asks why.
            await self._process.wait()
            self._has_ended = True
            for events in self._events.values():
                events.put_nowait(None)


def _lines(process: psutil.Process, file: str) -> list[str]:
    try:
        return Path(f"/proc/{process.pid}/{file}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _memory_bytes(process: psutil.Process, key: str) -> int:
    lines = _lines(process, "status")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _mapped_bytes(process: psutil.Process) -> dict[str, int]:
    """Return what is resident of each part of a file that is mapped, as it is in the file."""
    mapped: dict[str, int] = {}
    name = ""
    for line in _lines(process, "smaps"):
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):  # a mapping's first line: addresses, permissions, offset, device, inode, path
            name = f"{values[4]} {values[1]}" if values[3] != "0" else ""
        elif name and key in ("Rss:", "Anonymous:"):
            mapped[name] = mapped.get(name, 0) + (1 if key == "Rss:" else -1) * int(values[0]) * 1024
    return mapped
