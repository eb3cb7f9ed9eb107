import json
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenizers import Tokenizer

from benchmarks.peers.adapters import PEERS
from benchmarks.peers.index import INDEX, index
from benchmarks.peers.model import SHAPES, make_model, prompt_token_ids
from benchmarks.peers.peer import ADAPTERS, Command, Launch, Limits, NotInstalled, Peer, install
from benchmarks.peers.report import Row, markdown, ratios
from benchmarks.peers.running import HttpTarget, Running
from benchmarks.peers.turns import System, measure
from penstock.bench import BenchRequest
from penstock.errors import UnavailableError

LIMITS = Limits(threads=1, cache_tokens=1024, kv_bytes_per_token=1, max_running=64, max_model_tokens=1024)

ECHO = """
from benchmarks.peers.workers import lines

class Echo:
    def __init__(self):
        self.left = {}
    def add(self, request_id, prompt, num_tokens):
        self.left[request_id] = num_tokens
    @property
    def has_work(self):
        return bool(self.left)
    def step(self):
        for request_id in list(self.left):
            self.left[request_id] -= 1
            finished = self.left[request_id] == 0
            if finished:
                del self.left[request_id]
            yield lines.Added(request_id, 1, finished)

output = lines.take_output()
print("noise that must not be read as an answer")
lines.run(Echo(), output)
"""


class EchoPeer(Peer):
    name = "echo"
    precisions = ("INT8",)
    install: ClassVar[tuple[str, ...]] = ()
    probe = "print('1.0')"
    code = ECHO

    def prepare(self, environment: Path, precision: str, model: Path, out: Path) -> Sequence[Command]:
        return [[sys.executable, "-c", f"open({str(out / 'converted')!r}, 'w').close()"]]

    def launch(self, environment: Path, precision: str, model: Path, prepared: Path, limits: Limits) -> Launch:
        assert (prepared / "converted").exists()
        return Launch(command=[sys.executable, "-c", self.code], port=None)

    def version(self, environment: Path) -> str:
        return "1.0"


class BrokenPeer(EchoPeer):
    name = "broken"
    code = "import sys; sys.exit('no AVX-512 here')"


class AbsentPeer(EchoPeer):
    name = "absent"

    def version(self, environment: Path) -> str:
        return Peer.version(self, environment)


async def run(home: Path, *peers: Peer, loads: Sequence[str] = "c") -> list[System]:
    systems = [System(peer=peer, precision="INT8", environment=home / "envs" / peer.name) for peer in peers]
    await measure(
        systems,
        model=home / "model",
        home=home,
        loads=loads,
        rounds=2,
        starts=2,
        token_ids=range(100),
        limits=LIMITS,
    )
    return systems


async def test_a_worker_is_started_measured_and_stopped(tmp_path: Path) -> None:
    [system] = await run(tmp_path, EchoPeer(), loads="abcd")
    assert system.failure is None
    assert len(system.cold_start_s) == 2
    assert [(turn.load, turn.round) for turn in system.turns] == [(load, n) for load in "abcd" for n in (0, 1)]
    assert all(turn.num_pieces_per_token == 1 for turn in system.turns)
    assert system.turns[0].report.num_output_tokens == 128
    assert system.peak_memory_bytes
    assert system.peak_memory_bytes > 1e6


async def test_what_cannot_run_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    broken, absent, echo = await run(tmp_path, BrokenPeer(), AbsentPeer(), EchoPeer())
    assert broken.failure == "did not start: no AVX-512 here"
    assert absent.failure is not None
    assert absent.failure.startswith("not installed: no environment at")
    assert echo.failure is None
    assert len(echo.turns) == 2
    text = markdown([broken, absent, echo], {"model": {"shape": "tiny"}, "date": "2026-01-31"})
    assert "| broken INT8 | did not start: no AVX-512 here |" in text


def test_install_stops_at_the_command_that_fails_and_says_why(tmp_path: Path) -> None:
    class Unbuildable(EchoPeer):
        install = ("python -c pass", "python -c import(compiler)", "python -c open('unreached','w')")

    with pytest.raises(NotInstalled, match=r"`python -c import\(compiler\)` failed: SyntaxError"):
        install(Unbuildable(), tmp_path / "env")
    assert Peer.version(Unbuildable(), tmp_path / "env") == "1.0"
    assert not (tmp_path / "env" / "unreached").exists()


def test_files_that_install_commands_name_are_there() -> None:
    named = [word for peer in PEERS for line in peer.install for word in line.split() if "{adapters}" in word]
    assert named
    assert all(Path(word.replace("{adapters}", str(ADAPTERS))).is_file() for word in named)


class LossyClient:
    """Loses ``num_lost`` answers, after ``num_pieces`` of each."""

    def __init__(self, num_lost: int, num_pieces: int = 0) -> None:
        self.num_lost = num_lost
        self.num_pieces = num_pieces

    async def first_model_name(self) -> str:
        return "m"

    async def stream(self, path: str, body: object) -> AsyncGenerator[dict[str, Any], None]:
        self.num_lost -= 1
        if self.num_lost >= 0:
            for _ in range(self.num_pieces):
                yield {"choices": [{"text": "x"}]}
            raise UnavailableError("closed")
        yield {"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}}


@pytest.mark.parametrize(
    ("num_lost", "num_pieces", "is_answered"), [(0, 0, True), (1, 0, True), (2, 0, False), (1, 1, False)]
)
async def test_a_request_is_sent_once_more_only_if_nothing_came_of_it(
    num_lost: int, num_pieces: int, is_answered: bool
) -> None:
    target = HttpTarget(LossyClient(num_lost, num_pieces), {})  # type: ignore[arg-type]
    request = BenchRequest(prompt_token_ids=(1,), num_output_tokens=1, arrival_s=0.0)
    if is_answered:
        assert await target.generate(request, "r", lambda: None) == 1
    else:
        with pytest.raises(UnavailableError, match="closed"):
            await target.generate(request, "r", lambda: None)


async def test_a_worker_that_dies_ends_what_waits_for_it(tmp_path: Path) -> None:
    code = ECHO.replace("self.left[request_id] -= 1", "if request_id == 'last': raise SystemExit('out of memory')")
    code = code.replace("finished = self.left[request_id] == 0", "finished = True")
    async with Running(Launch(command=[sys.executable, "-c", code], port=None), tmp_path / "log") as running:
        request = BenchRequest(prompt_token_ids=(1,), num_output_tokens=1, arrival_s=0.0)
        assert await running.target.generate(request, "other", lambda: None) == 1
        for _ in range(2):
            with pytest.raises(UnavailableError, match="the worker has ended"):
                await running.target.generate(request, "last", lambda: None)
    assert (tmp_path / "log").read_text().endswith("out of memory\n")


def test_ratios_pair_rounds_and_above_one_is_always_better() -> None:
    table = [
        Row("tokens/s", False, {"penstock INT8": [30.0, 20.0], "openvino INT8": [10.0, 10.0], "vllm BF16": [1.0]}),
        Row("TTFT, s", True, {"penstock INT8": [0.1, 0.1], "openvino INT8": [0.2, 0.4]}),
    ]
    found = {(ratio.label, ratio.theirs): ratio.rounds for ratio in ratios(table)}
    assert found == {
        ("tokens/s", "openvino INT8"): pytest.approx([3.0, 2.0]),
        ("TTFT, s", "openvino INT8"): pytest.approx([2.0, 4.0]),
    }


def test_the_model_has_the_shape_and_a_text_for_every_token_of_a_prompt(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    path = make_model(tmp_path / "tiny", shape)
    config = json.loads((path / "config.json").read_text())
    assert config["num_hidden_layers"] == shape.num_hidden_layers
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == shape.vocab_size
    assert all(tokenizer.decode([token_id]).isascii() for token_id in prompt_token_ids(shape))
    assert all(tokenizer.decode([token_id]) for token_id in prompt_token_ids(shape))
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert make_model(path, shape) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_the_table_of_results_has_every_run() -> None:
    assert INDEX.read_text() == index(), "run `python -m benchmarks.peers.index`"
