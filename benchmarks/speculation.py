"""What speculation gains and costs on penstock-mini: `python -m benchmarks.speculation`.

One engine answers the same requests by turns guessing and not (two engines differ by some percent in speed by where
their memory lies); ratios are of the seconds of one request (or of one crowd of them), taken within a pair that ran one
after the other. Both must say the same tokens. Workloads:

edit      the prompt holds a function of the standard library and asks for one of its names to be changed; the answer is
          the edited function. Penstock-mini cannot edit: the tokens are dictated, by raising the logit of the next one,
          so that it computes what it always does and says what a model that can edit would say.
free      the same, saying what penstock-mini says by itself, which soon goes round in circles.
question  a question about the standard library, as it was trained to answer.
random    tokens at random, greedily.
sampled   tokens at random, at temperature 1.
"""

import argparse
import builtins
import heapq
import inspect
import json
import keyword
import random
import re
import shutil
import statistics
import string
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.engine.config import RunnerConfig, SpeculationConfig
from penstock.engine.engine import Engine
from penstock.engine.runner.base import StepResult
from penstock.engine.scheduler import ScheduledBatch
from penstock.engine.speculative.speculator import Speculator
from penstock.launch.engine import build_engine
from penstock.launch.settings import ModelSettings, Settings
from penstock.launch.text import load_template, load_tokenizer
from penstock.protocol import GenerateRequest, SamplingParams

SOURCES: list[Callable[..., object]] = [
    textwrap.wrap,
    textwrap.indent,
    shutil.copytree,
    shutil.which,
    heapq.merge,
    heapq.nsmallest,
    string.Template.substitute,
    json.dumps,
    statistics.quantiles,
    inspect.getdoc,
]
QUESTIONS = ["What does len do?", "How do I sort a list?", "What is in the module json?", "What does textwrap.wrap do?"]
MOST_SOURCE_TOKENS = 600


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, how to sample, and what to say, if that is dictated."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    answer: tuple[int, ...] = ()


class Dictated:
    """Has every sequence of the engine say what is dictated, by its runner's own work and a higher logit."""

    def __init__(self, engine: Engine) -> None:
        self.token_ids: Sequence[int] = ()
        """Prompt and answer of all sequences; empty: each says what it likes"""
        self._positions: list[int] = []
        runner: Any = engine._runner
        self._sample = runner._sampler.sample
        self._execute = runner.execute
        runner._sampler.sample = self._sampled
        runner.execute = self._executed

    def _executed(self, batch: ScheduledBatch) -> StepResult:
        """Note where the rows to sample stand."""
        positions = [
            position
            for num_new, end in zip(batch.query_lens, batch.context_lens, strict=True)
            for position in range(end - num_new, end)
        ]
        self._positions = [positions[row] for row in batch.sample_rows]
        result: StepResult = self._execute(batch)
        return result

    def _sampled(self, logits: Tensor, *others: Any) -> Any:
        """Raise the logits of what comes next."""
        for row, position in enumerate(self._positions):
            if position + 1 < len(self.token_ids):
                logits[row, self.token_ids[position + 1]] += 1000
        return self._sample(logits, *others)


def rename(source: str) -> tuple[str, str, str]:
    """Return the name that a function uses most, a new one, and the function with it."""
    names = Counter(re.findall(r"\b[a-z_]{3,}\b", source))
    own = [n for n, _ in names.most_common() if not keyword.iskeyword(n) and not hasattr(builtins, n) and n != "self"]
    new = f"{own[0]}_item"
    return own[0], new, re.sub(rf"\b{own[0]}\b", new, source)


def workloads(num_tokens: int) -> dict[str, list[Task]]:
    """Return the tasks of each workload."""
    tokenizer, template = load_tokenizer(ModelSettings()), load_template(ModelSettings())
    assert template is not None

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def ask(text: str) -> list[int]:
        return encode(template.render([{"role": "user", "content": text}], add_generation_prompt=True))

    edits, free = [], []
    for function in SOURCES:
        source = tokenizer.decode(encode(inspect.getsource(function))[:MOST_SOURCE_TOKENS])
        old, new, edited = rename(source)
        prompt, answer = ask(f"Rename `{old}` to `{new}`:\n\n{source}"), encode(edited)
        edits.append(Task(prompt, len(answer), answer=tuple(answer)))
        free.append(Task(prompt + answer[: len(answer) // 3], num_tokens))
    noise = [[random.Random(i).randrange(300, 6000) for _ in range(200)] for i in range(len(SOURCES))]
    return {
        "edit": edits,
        "free": free,
        "question": [Task(ask(question), num_tokens) for question in QUESTIONS],
        "random": [Task(prompt, num_tokens) for prompt in noise],
        "sampled": [Task(prompt, num_tokens, 1.0) for prompt in noise],
    }


@dataclass(frozen=True, slots=True)
class Bench:
    """One engine, and what turns its guessing off and dictates what it says."""

    engine: Engine
    speculator: Speculator
    dictated: Dictated
    clock: Callable[[], float]

    def run(self, task: Task, num_streams: int, *, guesses: bool) -> tuple[float, list[list[int]]]:
        """Return the seconds that ``num_streams`` at once take, and what they say."""
        self.engine._speculator = self.speculator if guesses else None
        self.dictated.token_ids = [*task.prompt, *task.answer] if task.answer else ()
        said: list[list[int]] = [[] for _ in range(num_streams)]
        began = self.clock()
        for stream in range(num_streams):
            sampling = SamplingParams(
                max_tokens=task.max_tokens, temperature=task.temperature, seed=stream, ignore_eos=True
            )
            self.engine.add(GenerateRequest(request_id=str(stream), prompt_token_ids=task.prompt, sampling=sampling))
        while self.engine.has_work:
            for delta in self.engine.step():
                assert delta.error is None, delta.error
                said[int(delta.request_id)].extend(delta.token_ids)
        return self.clock() - began, said


def measure(
    name: str,
    tasks: list[Task],
    bench: Bench,
    *,
    pairs: int,
    num_streams: int,
) -> None:
    """Print a line on one workload."""
    counters = bench.speculator.counters
    before = (counters.num_draft_tokens, counters.num_accepted_tokens, counters.decode_s, counters.undrafted_decode_s)
    ratios, plain_rates, guessing_rates = [], [], []
    for pair in range(-1, pairs):
        for place, task in enumerate(tasks):
            turns = (False, True) if (pair + place) % 2 else (True, False)
            outcomes = {guesses: bench.run(task, num_streams, guesses=guesses) for guesses in turns}
            (plain_s, expected), (guessing_s, found) = outcomes[False], outcomes[True]
            assert found == expected, f"{name}: speculation changed what was said"
            assert not task.answer or tuple(found[0]) == task.answer
            if pair >= 0:
                num_tokens = sum(map(len, found))
                ratios.append(plain_s / guessing_s)
                plain_rates.append(num_tokens / plain_s)
                guessing_rates.append(num_tokens / guessing_s)
    drafted, accepted, decode_s, undrafted_s = (
        after - then
        for after, then in zip(
            (counters.num_draft_tokens, counters.num_accepted_tokens, counters.decode_s, counters.undrafted_decode_s),
            before,
            strict=True,
        )
    )
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"| {name} | {num_streams} | {statistics.median(plain_rates):,.0f} | {statistics.median(guessing_rates):,.0f} "
        f"| **{middle:.2f}** ({low:.2f} to {high:.2f}) | {accepted / drafted if drafted else 0:.0%} of {drafted:,} "
        f"| {undrafted_s / decode_s:.2f} |",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="suffix", choices=["ngram", "suffix"])
    parser.add_argument("--pairs", type=int, default=5, help="of each task")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer that is not dictated")
    parser.add_argument("--most", type=int, default=SpeculationConfig().max_tokens, help="tokens guessed at a time")
    parser.add_argument("--tasks", type=int, default=len(SOURCES), help="of each workload")
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--quantize", default=None)
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: with one thread, on a busy machine"
    )
    parser.add_argument("--workloads", default="edit,free,question,random,sampled")
    parser.add_argument("--streams", default="1,32")
    options = parser.parse_args()
    runner = RunnerConfig(threads=options.threads, quantize=options.quantize)
    speculation = SpeculationConfig(method=options.method, max_tokens=options.most)
    engine = build_engine(Settings(runner=runner, speculation=speculation))
    assert engine._speculator is not None
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    bench = Bench(engine, engine._speculator, Dictated(engine), clock)
    print("| workload | streams | tokens/s without | with | ratio (quartiles) | accepted | measured by the engine |")
    print("|---|---|---|---|---|---|---|")
    tasks = workloads(options.tokens)
    with torch.inference_mode():
        for num_streams in map(int, options.streams.split(",")):
            for name in options.workloads.split(","):
                measure(name, tasks[name][: options.tasks], bench, pairs=options.pairs, num_streams=num_streams)


if __name__ == "__main__":
    main()
