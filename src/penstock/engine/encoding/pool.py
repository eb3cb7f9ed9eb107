"""Encoders in processes of their own, so that the engine goes on decoding meanwhile, and outlives what kills one."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
import numpy as np

from penstock.engine.child import ChildProcess, exit_reason
from penstock.engine.encoding.messages import Encode, EncodedPictures, FromEncoder
from penstock.engine.encoding.source import Encoded, EncoderCounters
from penstock.engine.messages import LoadFailed
from penstock.engine.spawning import spawn
from penstock.errors import EncodingFailed, InternalError, NotReady, PenstockError, error_from_code
from penstock.protocol import Picture
from penstock.telemetry import get_logger

_log = get_logger(__name__)

_MOST_OVERTAKEN = 4
"""Times that smaller pictures may be handed out before one that waits longer"""
_MOST_DEATHS = 3
"""Encoders that may die at work on a picture before it is taken to be the cause"""
_MOST_FAILED_STARTS = 5
"""Restarts in a row that may fail before pictures wait for a process no more"""
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 10.0
"""Between restarts that fail: they are tried for as long as the pool lasts, for what lacks may come back"""


@dataclass(slots=True, eq=False)
class _Job:
    feature_id: int
    picture: Picture
    cost: float
    num_overtaken: int = 0
    """Times that smaller ones were handed out before it"""
    num_deaths: int = 0
    """Of encoders at work on it"""

    @property
    def rank(self) -> tuple[float, ...]:
        """What is handed out first is least."""
        return -self.num_deaths, -(self.num_overtaken // _MOST_OVERTAKEN), self.cost


class EncoderPool:
    """A ``FeatureSource`` of several processes. They are looked after on a thread, which the engine never waits for.

    Each is handed as many pictures at a time as a step's budget has room for, the smallest first, or one that has
    more. What a dead one was at work on is encoded again, each by itself, so that one that kills encoders fails alone.
    One that has started once is started again for as long as the pool lasts; while none can be, pictures fail at once.
    """

    def __init__(
        self, command: list[str], payload: bytes, *, num_workers: int, step_bytes: int, timeout_s: float
    ) -> None:
        """``command``, given the address to connect to as its last argument, runs ``worker.run_host``.

        ``step_bytes`` is a step's budget, as what the pixels of its patches take; an encoder that takes longer than
        ``timeout_s`` for what it was handed is killed.
        """
        self.counters = EncoderCounters(num_workers=num_workers)
        self._command = command
        self._payload = payload
        self._step_bytes = step_bytes
        self._timeout_s = timeout_s
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEncoder] = msgspec.msgpack.Decoder(FromEncoder)
        self._jobs: list[_Job] = []
        """In order; under the lock, for they are cancelled on the engine's thread"""
        self._lock = threading.Lock()
        self._done: deque[Encoded] = deque()
        self._wake: Callable[[], object] = lambda: None
        self._children: set[ChildProcess] = set()
        self._pids: set[int] = set()
        self._failing: set[int] = set()
        """Places of processes that could not be started too often in a row; while all are, pictures do not wait"""
        self._refusal: PenstockError = NotReady("no encoder process is running")
        """What becomes of pictures then"""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_jobs = asyncio.Event()
        self._is_closed = asyncio.Event()
        self._thread: threading.Thread | None = None

    @property
    def pids(self) -> frozenset[int]:
        """The processes that take pictures now."""
        return frozenset(self._pids)

    @property
    def has_news(self) -> bool:
        """Whether ``take`` would return something."""
        return bool(self._done)

    @property
    def is_behind(self) -> bool:
        """Never: others go on by themselves."""
        return False

    def cost(self, picture: Picture) -> float:
        """See ``FeatureSource.cost``; attention counts for nothing, for no step waits for it."""
        return len(picture.pixels) / self._step_bytes

    def cancel(self, feature_id: int) -> bool:
        """Take a picture out of the queue; one that an encoder has goes on, for it may come to use yet."""
        with self._lock:
            found = next((job for job in self._jobs if job.feature_id == feature_id), None)
            if found is not None:
                self._jobs.remove(found)
        return found is not None

    def start(self) -> None:
        """Start all processes and wait until they have loaded.

        Raises the reason of the first that cannot, and ``CancelledError`` if the pool is closed meanwhile.
        """
        loaded: Future[None] = Future()
        # Made here, so that the pool can be closed before its thread has come to run. Whatever loop the program has
        # chosen, only this one can have children on any thread.
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop, loaded), name="penstock-encoders", daemon=True
        )
        self._thread.start()
        try:
            loaded.result()
        except BaseException:
            self.close()
            raise

    def on_news(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, on another thread, when ``has_news`` has become true."""
        self._wake = wake

    def submit(self, work: Sequence[tuple[int, Picture]]) -> None:
        """Queue pictures."""
        assert self._loop is not None, "the pool was started"
        jobs = [_Job(feature_id, picture, self.cost(picture)) for feature_id, picture in work]
        self._loop.call_soon_threadsafe(self._enqueue, jobs)

    def take(self) -> list[Encoded]:
        """Return what was encoded since."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._done.popleft())
        return taken

    def close(self) -> None:
        """End all processes. Safe to call twice."""
        if self._thread is None or self._loop is None:
            return
        self._loop.call_soon_threadsafe(self._is_closed.set)
        self._thread.join()
        self._thread = None

    # ---- on the thread

    def _run(self, loop: asyncio.AbstractEventLoop, loaded: "Future[None]") -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._look_after_all(loaded))

    async def _look_after_all(self, loaded: "Future[None]") -> None:
        loop = asyncio.get_running_loop()
        starting = [loop.create_future() for _ in range(self.counters.num_workers)]
        tasks = [asyncio.create_task(self._look_after(place, one)) for place, one in enumerate(starting)]
        starts, closed = asyncio.gather(*starting), asyncio.create_task(self._is_closed.wait())
        await asyncio.wait((starts, closed), return_when=asyncio.FIRST_COMPLETED)
        if not starts.done():  # whoever waits for them is interrupted
            starts.cancel()
            loaded.cancel()
        elif (error := starts.exception()) is not None:
            loaded.set_exception(error)
        else:
            loaded.set_result(None)
        await closed
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for child in list(self._children):
            await child.close()

    async def _look_after(self, place: int, started: "asyncio.Future[None]") -> None:
        """Keep one process running, if it can be started once; ``started`` is told how that went."""
        num_failed, delay_s = 0, _FIRST_DELAY_S
        while True:
            error = await self._run_one(place, started)
            if error is None:
                num_failed, delay_s = 0, _FIRST_DELAY_S
            elif not started.done():
                started.set_exception(error)
                return
            else:
                num_failed += 1
                _log.error("encoder_restart_failed", attempt=num_failed, reason=error.message)
                if num_failed >= _MOST_FAILED_STARTS:
                    self._refuse(place, error, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            self.counters.num_restarts += 1

    async def _run_one(self, place: int, started: "asyncio.Future[None]") -> PenstockError | None:
        """Start a process and hand it pictures until it is dead; return why it could not be started, if so."""
        is_loaded = False
        try:
            child = self._spawn()
            self._children.add(child)
            try:
                if (error := await self._wait_loaded(child)) is not None:
                    return error
                is_loaded = True
                self._failing.discard(place)
                self._pids.add(child.pid)
                self._count_ready()
                if not started.done():
                    started.set_result(None)
                await self._feed(child)
                _log.error("encoder_died", how=exit_reason(child.returncode))
            finally:
                self._pids.discard(child.pid)
                self._count_ready()
                await child.close()
                self._children.discard(child)
        except Exception as error:  # the machine may lack memory, processes or files now and have them later
            _log.exception("encoder_failed")
            return None if is_loaded else InternalError(f"an encoder process could not be run: {error!r}")
        return None

    def _spawn(self) -> ChildProcess:
        spawned = spawn(self._command, self._payload)
        try:
            return ChildProcess(spawned)
        except BaseException:
            spawned.end()
            raise

    async def _wait_loaded(self, child: ChildProcess) -> PenstockError | None:
        data = await child.until_dead(child.receive())
        if data is None:
            how = exit_reason(child.returncode)
            return InternalError(
                f"an encoder process {how} while it loaded; see its log, and what memory the machine has left"
            )
        message = self._decoder.decode(data)
        if isinstance(message, LoadFailed):
            error = message.error
            return error_from_code(error.code, error.message, param=error.param)
        return None

    async def _feed(self, child: ChildProcess) -> None:
        """Hand a process pictures until it dies."""
        while await child.until_dead(self._has_jobs.wait()):
            jobs = self._next_jobs()
            if not jobs:
                continue
            try:
                child.send(self._encoder.encode(Encode([(job.feature_id, job.picture) for job in jobs])))
                data = await child.until_dead(child.receive(), self._timeout_s)
                if data is None:
                    self._retry(jobs, exit_reason(child.returncode))
                    child.kill()  # one that hangs hears nothing else
                    return
                message = self._decoder.decode(data)
                assert isinstance(message, EncodedPictures), "an encoder answers what it is handed"
                self._deliver(jobs, message)
            except Exception as error:  # sequences wait for an answer
                self._fail(jobs, EncodingFailed(f"what an encoder process said could not be used: {error!r}"))
                raise

    def _enqueue(self, jobs: list[_Job]) -> None:
        if self._is_failing:
            self._fail(jobs, self._refusal)
            return
        with self._lock:
            self._jobs.extend(jobs)
        self._has_jobs.set()

    def _next_jobs(self) -> list[_Job]:
        """Take a step's budget of pictures from the queue, or one that is more.

        One that an encoder has died of goes first, by itself; then one that was overtaken too often, then small ones.
        """
        with self._lock:
            order = sorted(self._jobs, key=lambda job: job.rank)
            jobs, cost = order[:1], sum(job.cost for job in order[:1])
            for job in order[1:]:
                if jobs[0].num_deaths or cost + job.cost > 1:
                    break
                jobs.append(job)
                cost += job.cost
            self._jobs = [job for job in self._jobs if job not in jobs]
            for job in self._jobs:
                job.num_overtaken += 1
            if not self._jobs:
                self._has_jobs.clear()
        return jobs

    def _deliver(self, jobs: list[_Job], message: EncodedPictures) -> None:
        num_tokens = {job.feature_id: job.picture.num_tokens for job in jobs}
        encoded = []
        for one in message.pictures:
            if one.error is not None:
                encoded.append(Encoded(one.feature_id, error_from_code(one.error.code, one.error.message)))
                continue
            rows = np.frombuffer(one.rows, dtype=np.float32).reshape(num_tokens[one.feature_id], -1)
            encoded.append(Encoded(one.feature_id, rows))
            self.counters.num_pictures += 1
            self.counters.num_tokens += num_tokens[one.feature_id]
        self._done.extend(encoded)
        self.counters.seconds += message.seconds
        self._wake()

    def _retry(self, jobs: list[_Job], how: str) -> None:
        """Queue again what a dead encoder was at work on, but what too many have died of."""
        for job in jobs:
            job.num_deaths += 1
        blamed = [job for job in jobs if job.num_deaths >= _MOST_DEATHS]
        fault = f"{_MOST_DEATHS} encoder processes died at work on an image of this request; the last {how}"
        self._fail(blamed, EncodingFailed(fault))
        with self._lock:
            self._jobs.extend(job for job in jobs if job.num_deaths < _MOST_DEATHS)
        self._has_jobs.set()

    @property
    def _is_failing(self) -> bool:
        return len(self._failing) == self.counters.num_workers

    def _refuse(self, place: int, error: PenstockError, delay_s: float) -> None:
        """Have no picture wait for the process at ``place``, which ``error`` keeps from starting, until it has."""
        self._failing.add(place)
        if not self._is_failing:
            return
        self._refusal = NotReady(
            f"images cannot be encoded now: no encoder process is running, and the last could not be started: "
            f"{error.message}. Another is tried every {_LONGEST_DELAY_S:g} s or sooner; send the request again later",
            retry_after_s=delay_s,
        )
        with self._lock:
            jobs, self._jobs = self._jobs, []
        self._fail(jobs, self._refusal)

    def _fail(self, jobs: Sequence[_Job], error: PenstockError) -> None:
        self._done.extend(Encoded(job.feature_id, error) for job in jobs)
        if jobs:
            self._wake()

    def _count_ready(self) -> None:
        self.counters.num_ready_workers = len(self._pids)
