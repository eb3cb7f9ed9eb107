"""Encoders in processes of their own: they die and come back, and nobody's text waits for them."""

import asyncio
import contextlib
import errno
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from penstock.engine.aio import InProcessClient
from penstock.engine.encoding.pool import EncoderPool
from penstock.engine.encoding.source import EncoderCounters
from penstock.engine.engine import Engine
from penstock.engine.spawning import Spawned, spawn
from penstock.errors import EncodingFailed, ModelUnreadable, NotReady
from penstock.images.families import load_processor
from penstock.protocol import ErrorInfo, GenerateRequest, TokenDelta
from tests.encoder_worker import BROKEN, DEADLY, DEADLY_ONCE, TORN
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.seeing_models import drawing, make_seeing_checkpoint, with_images

COMMAND = [sys.executable, "-m", "tests.encoder_worker"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeing_checkpoint(tmp_path_factory.mktemp("llava"))


def pool_of(path: Path, num_workers: int = 1, timeout_s: float = 300.0) -> EncoderPool:
    return EncoderPool(COMMAND, str(path).encode(), num_workers=num_workers, step_bytes=3 * 8192, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def pool(path: Path) -> Iterator[EncoderPool]:
    pool = pool_of(path)
    pool.start()
    yield pool
    pool.close()


def ask(
    path: Path, name: str, drawings: Sequence[int], max_tokens: int = 8, key: bytes | None = None
) -> GenerateRequest:
    """Return a greedy request about some drawings; ``key`` is the first one's instead of its own."""
    processor = load_processor(path)
    assert processor is not None
    images = [drawing(40 + seed, 60, seed) for seed in drawings]
    token_ids, pictures = with_images(path, processor, "@" * len(images) + "what is this?", images)
    if key is not None:
        pictures[0] = msgspec.structs.replace(pictures[0], key=key)
    return msgspec.structs.replace(greedy(name, token_ids, max_tokens), pictures=tuple(pictures))


def engine_over(path: Path, pool: EncoderPool) -> tuple[Engine, threading.Event]:
    """Return an engine that ``pool`` encodes for, and what is set when there is news."""
    engine = build_engine(path, source=pool, encoder_cache_bytes=1 << 18)
    news = threading.Event()
    engine.on_news(news.set)
    return engine, news


def run(engine: Engine, news: threading.Event, requests: Sequence[GenerateRequest]) -> dict[str, list[TokenDelta]]:
    """Run requests to their ends, waiting where there is nothing to do but wait."""
    deltas: dict[str, list[TokenDelta]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine._requests:
        while not engine.has_work:
            assert news.wait(120), "a step that waits is woken"
        news.clear()
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    return deltas


def alone(path: Path, request: GenerateRequest) -> list[int]:
    return tokens_of(run_to_end(build_engine(path), [request])[request.request_id])


def test_what_others_encode_says_the_same(path: Path, pool: EncoderPool) -> None:
    engine, news = engine_over(path, pool)
    requests = [ask(path, f"r{i}", seen) for i, seen in enumerate([[1], [2, 3, 1], [], [4, 4], [1], [5]])]
    deltas = run(engine, news, requests)
    for request in requests:
        assert tokens_of(deltas[request.request_id]) == alone(path, request)
    seeing = engine.status().seeing
    assert seeing is not None
    assert (seeing.num_workers, seeing.num_ready_workers, seeing.num_encoded_pictures) == (1, 1, 5)
    assert seeing.encode_s > 0
    assert is_whole(engine)


def test_text_does_not_wait_for_a_picture(path: Path, pool: EncoderPool) -> None:
    (pid,) = pool.pids
    engine, news = engine_over(path, pool)
    os.kill(pid, signal.SIGSTOP)
    try:
        engine.add(ask(path, "seeing", [7]))
        text = ask(path, "text", [])
        deltas = []
        engine.add(text)
        while "text" in engine._requests:
            deltas += engine.step()
        assert tokens_of(deltas) == alone(path, text)
        while engine.has_work:
            deltas += engine.step()
        assert "seeing" in engine._requests
        assert engine.status().num_running == 1
        assert not news.is_set()
    finally:
        os.kill(pid, signal.SIGCONT)
    while "seeing" in engine._requests:
        if not engine.has_work:
            assert news.wait(30)
        deltas += engine.step()
    assert engine.status().counters.num_generation_tokens == 16


def test_queued_pictures_that_nobody_waits_for_are_given_up(path: Path, pool: EncoderPool) -> None:
    (pid,) = pool.pids
    engine, news = engine_over(path, pool)
    features = engine._scheduler.encoding.features
    num_before = pool.counters.num_pictures
    requests = [ask(path, f"r{i}", [20 + i]) for i in range(5)]
    os.kill(pid, signal.SIGSTOP)
    try:
        for request in requests:
            engine.add(request)
        engine.step()
        for name in ("r0", "r2", "r3", "r4"):
            engine.abort(name)
        while len(features.unwanted()) > 1:  # the encoder has one of those
            engine.step()
    finally:
        os.kill(pid, signal.SIGCONT)
    answer: list[TokenDelta] = []
    while engine._requests:
        while not engine.has_work:
            assert news.wait(120)
        news.clear()
        answer += engine.step()
    assert tokens_of(answer) == alone(path, requests[1])
    num_encoded = pool.counters.num_pictures - num_before
    assert num_encoded in (1, 2), "the one that was waited for, and what the encoder had, if it had one by then"
    assert is_whole(engine)


def test_a_picture_that_an_encoder_died_of_is_encoded_by_the_next(path: Path, pool: EncoderPool) -> None:
    engine, news = engine_over(path, pool)
    before = pool.counters.num_restarts
    requests = [ask(path, "once", [8], key=DEADLY_ONCE), ask(path, "beside", [9]), ask(path, "text", [])]
    deltas = run(engine, news, requests)
    for request in requests:
        assert tokens_of(deltas[request.request_id]) == alone(path, request)
    assert pool.counters.num_restarts == before + 1


def test_a_picture_that_kills_encoders_fails_alone(path: Path, pool: EncoderPool) -> None:
    engine, news = engine_over(path, pool)
    bad = [ask(path, "deadly", [8], key=DEADLY), ask(path, "broken", [8], key=BROKEN)]
    good = [ask(path, f"r{i}", [10 + i]) for i in range(4)]
    deltas = run(engine, news, [*good[:2], *bad, *good[2:]])
    for request in good:
        assert tokens_of(deltas[request.request_id]) == alone(path, request)
    errors = [deltas[request.request_id][-1].error for request in bad]
    assert [error and error.code for error in errors] == [EncodingFailed.code] * 2
    assert "SIGKILL" in str(errors[0])
    assert "a broken picture" in str(errors[1])
    assert is_whole(engine)


def test_features_that_nobody_can_use_fail_who_waits_for_them(path: Path) -> None:
    pool = pool_of(path)
    pool.start()
    try:
        engine, news = engine_over(path, pool)
        requests = [ask(path, "torn", [8], key=TORN), ask(path, "good", [9])]
        torn, good = (run(engine, news, [request])[request.request_id] for request in requests)
        assert torn[-1].error is not None
        assert torn[-1].error.code == EncodingFailed.code
        assert tokens_of(good) == alone(path, requests[1])
        assert pool.counters.num_restarts == 1
        assert is_whole(engine)
    finally:
        pool.close()


def test_an_encoder_that_hangs_is_replaced(path: Path) -> None:
    pool = pool_of(path, timeout_s=3.0)
    pool.start()
    try:
        (pid,) = pool.pids
        engine, news = engine_over(path, pool)
        os.kill(pid, signal.SIGSTOP)
        requests = [ask(path, "seeing", [7]), ask(path, "text", [])]
        deltas = run(engine, news, requests)
        for request in requests:
            assert tokens_of(deltas[request.request_id]) == alone(path, request)
        assert pool.counters.num_restarts == 1
        assert pid not in pool.pids
        timelines = {name: some[-1].timeline for name, some in deltas.items()}
        assert timelines["seeing"] is not None
        assert timelines["seeing"].waited_s["images"] > 3.0
        assert timelines["text"] is not None
        assert timelines["text"].finished_s is not None
        assert timelines["text"].finished_s < 3.0, "it waits for nobody"
        assert "images" not in timelines["text"].waited_s
    finally:
        pool.close()


def test_a_model_that_cannot_load_says_why(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "nothing", 2)
    with pytest.raises(ModelUnreadable, match="is not there"):
        pool.start()


class Watched(EncoderCounters):
    """Counters that say when as many processes take pictures as shall."""

    def __init__(self, num_workers: int) -> None:
        self.are_ready = threading.Event()
        super().__init__(num_workers=num_workers)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "num_ready_workers":
            (self.are_ready.set if value == self.num_workers else self.are_ready.clear)()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what cannot be started tried again without delay."""
    monkeypatch.setattr("penstock.engine.encoding.pool._FIRST_DELAY_S", 0.001)
    monkeypatch.setattr("penstock.engine.encoding.pool._LONGEST_DELAY_S", 0.004)


def refused(path: Path, engine: Engine, news: threading.Event, seen: int) -> ErrorInfo:
    """Return why a picture cannot be encoded now, which text does not care about."""
    requests = [ask(path, "seeing", [seen]), ask(path, "text", [])]
    deltas = run(engine, news, requests)
    assert tokens_of(deltas["text"]) == alone(path, requests[1])
    error = deltas["seeing"][-1].error
    assert error is not None
    assert error.code == NotReady.code
    assert error.retry_after_s
    assert is_whole(engine)
    return error


@pytest.mark.usefixtures("hurried")
def test_an_encoder_that_is_killed_as_often_as_it_loads_comes_back(path: Path, tmp_path: Path) -> None:
    born, go_on = tmp_path / "born", tmp_path / "go_on"
    # Whoever opens one end of these waits for who opens the other, so that each start waits for the test.
    script = (
        f"if [ -e {born} ]; then echo $$ > {born}; read go < {go_on}; fi; exec {sys.executable} -m {COMMAND[-1]} $0"
    )
    pool = EncoderPool(["sh", "-c", script], str(path).encode(), num_workers=1, step_bytes=3 * 8192, timeout_s=300)
    pool.counters = counters = Watched(1)
    pool.start()
    try:
        engine, news = engine_over(path, pool)
        waiting = ask(path, "waiting", [7])
        for fifo in (go_on, born):
            os.mkfifo(fifo)
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        engine.add(waiting)
        engine.step()
        os.kill(pid, signal.SIGKILL)
        for _ in range(5):
            assert not pool.has_news
            os.kill(int(born.read_text()), signal.SIGKILL)
        deltas: list[TokenDelta] = []
        while engine._requests:
            assert news.wait(60)
            news.clear()
            deltas += engine.step()
        error = deltas[-1].error
        assert error is not None
        assert error.code == NotReady.code
        for told in ("no encoder process is running", "SIGKILL while it loaded", "see its log", "memory", "later"):
            assert told in error.message
        for seen in range(8, 12):
            pid = int(born.read_text())  # one loads, and nobody waits for it
            assert "SIGKILL" in refused(path, engine, news, seen).message
            os.kill(pid, signal.SIGKILL)
        assert not counters.are_ready.is_set()
        assert born.read_text()
        born.unlink()
        go_on.write_text("on\n")
        assert counters.are_ready.wait(60)
        assert tokens_of(run(engine, news, [waiting])["waiting"]) == alone(path, waiting)
        assert counters.num_restarts == 10
        assert is_whole(engine)
    finally:
        pool.close()


@pytest.mark.usefixtures("hurried")
def test_pictures_wait_for_no_process_only_while_none_can_be_started(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_short, is_tried = threading.Event(), threading.Semaphore(0)

    def spawn_if_possible(command: list[str], payload: bytes | None = None) -> Spawned:
        if is_short.is_set():
            is_tried.release()
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return spawn(command, payload)

    monkeypatch.setattr("penstock.engine.encoding.pool.spawn", spawn_if_possible)
    pool = pool_of(path, num_workers=2)
    pool.counters = counters = Watched(2)
    pool.start()
    try:
        engine, news = engine_over(path, pool)
        first, second = pool.pids
        is_short.set()
        os.kill(first, signal.SIGKILL)
        for _ in range(7):
            assert is_tried.acquire(timeout=60)
        request = ask(path, "seen by the other", [7])
        assert tokens_of(run(engine, news, [request])[request.request_id]) == alone(path, request)
        for again in range(2):
            for pid in pool.pids:
                os.kill(pid, signal.SIGKILL)
            assert "Cannot allocate memory" in refused(path, engine, news, 8).message
            is_short.clear()
            assert counters.are_ready.wait(60)
            request = ask(path, "again", [9 + again])
            assert tokens_of(run(engine, news, [request])["again"]) == alone(path, request)
            is_short.set()
        assert pool.pids.isdisjoint({first, second})
    finally:
        pool.close()


def test_closing_ends_encoders_that_load(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loads_for_ever = f"import os, signal; open({str(fifo)!r}, 'w').write(str(os.getpid())); signal.pause()"
    pool = EncoderPool([sys.executable, "-c", loads_for_ever], b"", num_workers=1, step_bytes=1, timeout_s=60)
    with ThreadPoolExecutor(1) as waiter:
        started = waiter.submit(pool.start)
        pid = int(fifo.read_text())
        pool.close()
        with pytest.raises(CancelledError):
            started.result()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_64_clients_lose_nothing_when_encoders_are_killed(path: Path) -> None:
    pool = pool_of(path, 2)
    pool.start()
    client = InProcessClient(lambda: build_engine(path, num_blocks=1200, source=pool, encoder_cache_bytes=1 << 15))
    await client.start()
    drawn = random.Random(0)
    requests = [
        ask(path, f"r{i}", [drawn.randrange(40) for _ in range(i % 3)], 4 + drawn.randrange(20)) for i in range(160)
    ]
    waiting = list(requests)
    answers: dict[str, list[int]] = {}

    async def work() -> None:
        while waiting:
            request = waiting.pop()
            answers[request.request_id] = tokens_of([delta async for delta in client.generate(request)])
            if len(answers) % 40 == 20:
                for pid in list(pool.pids)[: 1 + len(answers) // 80]:
                    with contextlib.suppress(ProcessLookupError):  # killed a moment ago
                        os.kill(pid, signal.SIGKILL)

    await asyncio.gather(*(work() for _ in range(64)))
    engine = build_engine(path, num_blocks=1200)
    expected = run_to_end(engine, requests)
    assert answers == {name: tokens_of(deltas) for name, deltas in expected.items()}
    # The last encoders may just have been killed: a new picture's answer waits for one.
    assert tokens_of([delta async for delta in client.generate(ask(path, "last", [40]))])
    assert pool.counters.num_restarts
    pids = pool.pids
    await client.stop()
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):  # whoever ends an engine ends its encoders
            os.kill(pid, 0)
