"""How fast models answer, measured by turns: what else the machine does meets both alike."""

import random
import statistics
from collections.abc import Sequence

from penstock.bench import EngineTarget, LengthRange, RunReport, Workload, draw_requests, drive, report_run
from penstock.errors import InternalError
from penstock.eval.result import Pace, SpeedReport, Spread
from penstock.eval.tasks import OnItem
from penstock.protocol import EngineClient

NUM_PROMPT_TOKENS = 128
NUM_OUTPUT_TOKENS = 64
NUM_REQUESTS = 4
NUM_ROUNDS = 5


async def measure_speed(clients: Sequence[EngineClient], *, on_item: OnItem) -> SpeedReport:
    """Return how fast a candidate answers, and by turns a reference if ``clients`` holds two: A, B, A, B, ...

    One request at a time, greedy, random prompts; one round before the first is not counted.
    """
    vocab_size = min(client.model().vocab_size for client in clients)
    vocabulary = random.Random(0).sample(range(vocab_size), min(1000, vocab_size))
    workload = Workload(
        num_requests=NUM_REQUESTS,
        prompt_tokens=LengthRange(low=NUM_PROMPT_TOKENS, high=NUM_PROMPT_TOKENS),
        output_tokens=LengthRange(low=NUM_OUTPUT_TOKENS, high=NUM_OUTPUT_TOKENS),
        concurrency=1,
    )
    runs: list[list[RunReport]] = [[] for _ in clients]
    for number in range(-1, NUM_ROUNDS):
        for own, client in zip(runs, clients, strict=True):
            requests = draw_requests(workload, vocabulary, repetition=number)
            run = await drive(EngineTarget(client), requests, concurrency=1, name=f"speed-{number}")
            report = report_run(run, None)
            if report.errors:
                raise InternalError(f"requests of the speed measurement failed: {report.errors}")
            if number >= 0:
                own.append(report)
        on_item(number + 2, NUM_ROUNDS + 1)
    rates = [[_rate(run) for run in own] for own in runs]
    return SpeedReport(
        num_prompt_tokens=NUM_PROMPT_TOKENS,
        num_output_tokens=NUM_OUTPUT_TOKENS,
        num_requests=NUM_REQUESTS,
        num_rounds=NUM_ROUNDS,
        candidate=_pace(runs[0]),
        reference=_pace(runs[1]) if len(runs) > 1 else None,
        tokens_per_s_ratio=_spread([a / b for a, b in zip(*rates, strict=True)]) if len(runs) > 1 else None,
    )


def _pace(runs: Sequence[RunReport]) -> Pace:
    return Pace(
        tokens_per_s=_spread([_rate(run) for run in runs]),
        first_token_s=_spread([run.ttft.p50_s for run in runs if run.ttft is not None]),
    )


def _rate(run: RunReport) -> float:
    assert run.stream_tokens_per_s is not None, "every answer has several tokens"
    return run.stream_tokens_per_s


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), least=min(values), most=max(values))
