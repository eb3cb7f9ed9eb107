"""The engine in its own process: killed, refused, drained, abandoned."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from penstock.engine.messages import Stepped
from penstock.engine.process import STALL_S, ProcessClient
from penstock.errors import Draining, InvalidRequest, ModelNotFound, ModelUnreadable, NotReady, WorkerDied
from penstock.protocol import EngineState, TokenDelta
from penstock.text.grammar import choice_grammar, lark_grammar
from tests.adapters import merged, write_adapter
from tests.engines import greedy, tokens_of
from tests.tiny_models import reference_greedy

COMMAND = [sys.executable, "-m", "tests.engine_worker"]
PROMPT = list(b"def main(argv):")


def client_of(path: Path) -> ProcessClient:
    return ProcessClient(COMMAND, str(path).encode())


@pytest_asyncio.fixture
async def client(checkpoint: Callable[[str], Path]) -> AsyncIterator[ProcessClient]:
    client = client_of(checkpoint("llama"))
    await client.start()
    yield client
    await client.stop()


async def collect(client: ProcessClient, name: str, max_tokens: int) -> list[TokenDelta]:
    return [delta async for delta in client.generate(greedy(name, PROMPT, max_tokens))]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a state that the other process brings about; the test's own timeout bounds it."""
    while not condition():
        await asyncio.to_thread(os.sched_yield)


def is_idle(client: ProcessClient) -> bool:
    status = client.status()
    return status.num_free_blocks == status.num_blocks and not status.num_running


async def test_adapters_are_there_again_after_a_restart(
    client: ProcessClient, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("llama")
    first, second = (write_adapter(tmp_path / f"{i}", path, seed=i) for i in range(2))
    expected = reference_greedy(merged(tmp_path / "merged", path, first), PROMPT, 12)
    await client.load_adapter("first", str(first))
    await client.load_adapter("second", str(second))
    with pytest.raises(InvalidRequest, match="as many as --max-loras allows"):
        await client.load_adapter("third", str(first))
    shutil.rmtree(second)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client.status().num_restarts == 1 and client.status().state is EngineState.READY)
    request = msgspec.structs.replace(greedy("one", PROMPT, 12), adapter="first")
    assert tokens_of([delta async for delta in client.generate(request)]) == expected
    assert client.adapters() == ("first",), "what is not there any more is forgotten"
    await client.unload_adapter("first")
    with pytest.raises(ModelNotFound, match="no adapter named 'first'"):
        await client.unload_adapter("first")


async def test_tokens_cross_the_border_unchanged(client: ProcessClient, checkpoint: Callable[[str], Path]) -> None:
    deltas = await collect(client, "one", 12)
    assert tokens_of(deltas) == reference_greedy(checkpoint("llama"), PROMPT, 12)
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].timeline is not None
    status = client.status()
    assert status.state is EngineState.READY
    assert status.model is not None
    assert status.counters.num_generation_tokens == 12


class Noting:
    """A decoder that notes the steps it was told of."""

    def __init__(self, client: ProcessClient) -> None:
        self._decoder, self.steps = client._decoder, list[Stepped]()
        client._decoder = self  # type: ignore[assignment]

    def decode(self, data: bytes) -> object:
        message = self._decoder.decode(data)
        if isinstance(message, Stepped):
            self.steps.append(message)
        return message


async def test_all_tokens_of_a_step_come_in_one_message(client: ProcessClient) -> None:
    noted = Noting(client)
    await asyncio.gather(*(collect(client, str(i), 20) for i in range(8)))
    numbers = [step.status.counters.num_steps for step in noted.steps]
    assert numbers == list(range(1, len(numbers) + 1))
    assert max(len(step.deltas) for step in noted.steps) == 8
    assert sum(len(delta.token_ids) for step in noted.steps for delta in step.deltas) == 8 * 20


async def test_a_grammar_is_compiled_while_the_loop_waits(client: ProcessClient) -> None:
    async def text(name: str, grammar: str) -> str:
        request = greedy(name, PROMPT, 20, ignore_eos=False, grammar=grammar)
        return "".join([delta.text async for delta in client.generate(request)])

    assert await text("alone", choice_grammar(["left"])) == "left"
    answers = await asyncio.gather(*(text(str(i), choice_grammar([f"answer {i}"])) for i in range(5)))
    assert answers == [f"answer {i}" for i in range(5)]
    with pytest.raises(InvalidRequest, match="unknown name"):
        await text("broken", lark_grammar("start: nothing"))
    abandoned = client.generate(greedy("abandoned", PROMPT, 20, ignore_eos=False, grammar=choice_grammar(["a" * 19])))
    await anext(abandoned)
    await abandoned.aclose()
    await until(lambda: is_idle(client))


async def test_kill_9_fails_what_runs_and_the_next_request_is_served(client: ProcessClient) -> None:
    has_begun = asyncio.Event()

    async def fails(i: int) -> bool:
        try:
            async for _ in client.generate(greedy(f"r{i}", [*PROMPT, i], 110)):
                has_begun.set()
        except WorkerDied as error:
            return "SIGKILL" in str(error)
        return False

    # Many more than run at once, so that some are in the middle however late the kill comes.
    requests = asyncio.gather(*(fails(i) for i in range(200)))
    await has_begun.wait()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    assert sum(await requests) > 100
    assert client.status().state is EngineState.RESTARTING
    with pytest.raises(NotReady):
        await collect(client, "early", 1)
    await until(lambda: client.status().state is EngineState.READY)
    assert client.status().num_restarts == 1
    assert len(tokens_of(await collect(client, "after", 5))) == 5


async def test_closing_a_stream_frees_its_blocks(client: ProcessClient) -> None:
    streams = [client.generate(greedy(f"r{i}", PROMPT, 110)) for i in range(8)]
    for stream in streams:
        await anext(stream)
    assert not is_idle(client)
    for stream in streams:
        await stream.aclose()
    await until(lambda: is_idle(client))


async def test_a_thousand_disconnects_leak_nothing(client: ProcessClient) -> None:
    async def leave(i: int) -> None:
        stream = client.generate(greedy(f"r{i}", [*PROMPT, i % 256], 60))
        for _ in range(i % 4):
            await anext(stream)
        await stream.aclose()

    for start in range(0, 1000, 50):
        await asyncio.gather(*(leave(i) for i in range(start, start + 50)))
    assert len(tokens_of(await collect(client, "last", 3))) == 3
    assert is_idle(client)
    assert not client.metrics._last_token_s
    assert not client.metrics._started_s


async def test_draining_finishes_what_runs_and_takes_nothing_new(client: ProcessClient) -> None:
    stream = client.generate(greedy("r", PROMPT, 40))
    await anext(stream)
    drained = asyncio.create_task(client.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await collect(client, "late", 1)
    rest = [delta async for delta in stream]
    assert rest[-1].finish_reason == "length"
    assert await drained


async def test_work_without_a_step_is_a_stall_and_rest_is_not(checkpoint: Callable[[str], Path]) -> None:
    now_s = 0.0
    client = ProcessClient(COMMAND, str(checkpoint("llama")).encode(), clock=lambda: now_s)
    await client.start()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    try:
        now_s += 3600
        assert client.status().state is EngineState.READY, "nothing to do for an hour"
        first = asyncio.create_task(collect(client, "first", 1))
        await asyncio.sleep(0)
        assert client.status().state is EngineState.READY, "it has only just come"
        now_s += STALL_S + 1
        assert client.status().state is EngineState.STALLED
        assert "31 s" in str(client.status().reason)
    finally:
        os.kill(client.pid, signal.SIGCONT)
    await first
    assert client.status().state is EngineState.READY
    await client.stop()


async def test_a_model_that_cannot_load_says_why(tmp_path: Path) -> None:
    client = client_of(tmp_path / "nothing")
    with pytest.raises(ModelUnreadable, match="is not there"):
        await client.start()
    assert client.status().state is EngineState.FAILED
    await client.stop()


def test_the_engine_ends_when_its_server_does(checkpoint: Callable[[str], Path]) -> None:
    code = (
        "import asyncio, os, sys\n"
        "from tests.engine.test_process import client_of\n"
        "from pathlib import Path\n"
        "async def main():\n"
        "    client = client_of(Path(sys.argv[1]))\n"
        "    await client.start()\n"
        "    print(client.pid, flush=True)\n"
        "    os._exit(0)\n"
        "asyncio.run(main())\n"
    )
    server = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint("llama"))], capture_output=True, text=True, check=True
    )
    pid = int(server.stdout)
    # The worker is nobody's child now: the pipe that closed is all it has to go by.
    while _is_alive(pid):
        os.sched_yield()


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
