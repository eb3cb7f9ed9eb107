"""What scheduling and bookkeeping cost: `python -m benchmarks.scheduler_cost`.

The real engine with a runner that computes nothing: queue, scheduler, block pool, sampled tokens, detokenizing, stop
conditions, deltas and their encoding. Prints microseconds per running request per step while all decode.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from penstock.engine.config import SchedulerConfig
from penstock.engine.engine import Engine
from penstock.engine.host import EngineHost
from penstock.engine.kv import BlockPool, CacheManager
from penstock.engine.runner import StepResult
from penstock.engine.sampling import SampledToken
from penstock.engine.scheduler import ScheduledBatch, Scheduler
from penstock.models import resolve_model
from penstock.protocol import GenerateRequest, MemoryPlan, ModelInfo, Picture, SamplingParams
from penstock.text import Tokenizer

NUM_STEPS = 200


class NullRunner:
    """Samples the same token for every row."""

    def add(
        self,
        sequence_id: int,
        index: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        matcher: object = None,
        adapter: object | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Nothing to prepare."""

    def load_adapter(self, path: Path) -> object:
        """Never asked for."""
        raise NotImplementedError(path)

    def remove(self, sequence_id: int) -> None:
        """Nothing to forget."""

    def num_possible(self, sequence_id: int, draft: Sequence[int]) -> int:
        """Nothing is ruled out."""
        return len(draft)

    def matcher(self, sequence_id: int) -> None:
        """Nobody is held to anything."""

    def commit(self, sequence_id: int, token_id: int) -> bool:
        """Nothing to remember."""
        return False

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Return a token for each row."""
        return StepResult([SampledToken(500) for _ in batch.sample_rows])


def measure(num_running: int) -> list[float]:
    """Return microseconds per running request of each step."""
    tokenizer = Tokenizer.load(resolve_model("penstock-mini"))
    num_blocks = num_running * 32
    memory = MemoryPlan(
        weights_bytes=0,
        activation_peak_bytes=0,
        block_bytes=0,
        num_blocks=num_blocks,
        block_size=16,
        available_bytes=0,
    )
    info = ModelInfo(
        name="null",
        source="",
        architecture="",
        dtype="",
        kv_dtype="",
        num_parameters=0,
        vocab_size=6144,
        max_model_tokens=512,
        eos_token_ids=(2,),
        hidden_size=0,
        memory=memory,
    )
    scheduler = Scheduler(
        SchedulerConfig(step_tokens=4096, max_running=num_running), CacheManager(BlockPool(num_blocks), block_size=16)
    )
    host = EngineHost(Engine(runner=NullRunner(), scheduler=scheduler, tokenizer=tokenizer, model=info), lambda: None)
    engine = host._engine
    for i in range(num_running):
        sampling = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.0)
        engine.add(GenerateRequest(request_id=str(i), prompt_token_ids=[i % 6000] * 64, sampling=sampling))
    while any(sequence.num_output_tokens == 0 for sequence in scheduler.running) or scheduler.num_waiting:
        engine.step()
    encoder = msgspec.msgpack.Encoder()
    buffer = bytearray()
    costs = []
    for _ in range(NUM_STEPS):
        began = time.perf_counter()
        encoder.encode_into(host.step(), buffer)
        costs.append((time.perf_counter() - began) / num_running * 1e6)
    assert len(scheduler.running) == num_running, "everybody must have been decoding throughout"
    return costs


def main() -> None:
    """Print a row for each number of running requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[8, 32, 128, 512])
    print("| running | µs per request and step, median | min | max |\n|---|---|---|---|")
    for num_running in parser.parse_args().running:
        costs = measure(num_running)
        print(f"| {num_running} | {statistics.median(costs):.1f} | {min(costs):.1f} | {max(costs):.1f} |")


if __name__ == "__main__":
    main()
