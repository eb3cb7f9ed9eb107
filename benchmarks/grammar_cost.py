"""What following a grammar costs: `python -m benchmarks.grammar_cost`.

First each part by itself, over penstock-mini's vocabulary and over one as large as Llama 3's, made of pieces of the
standard library. Then what of it a batch notices: steps of penstock-mini with 32 running, none of them or all of them
following a schema, by turns.
"""

import itertools
import json
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from penstock.engine.config import SpeculationConfig
from penstock.engine.engine import Engine
from penstock.engine.sampling import GrammarMasks
from penstock.launch.engine import build_engine
from penstock.launch.settings import Settings
from penstock.models import resolve_model
from penstock.protocol import GenerateRequest, SamplingParams
from penstock.text import Tokenizer
from penstock.text.grammar import GrammarCompiler, compile_thread, json_schema_grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["function", "class", "module"]},
        "line": {"type": "integer", "minimum": 1},
        "arguments": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "default": {"type": ["string", "number", "null"]}},
                "required": ["name", "default"],
                "additionalProperties": False,
            },
        },
        "documentation": {"type": "string"},
    },
    "required": ["name", "kind", "line", "arguments", "documentation"],
    "additionalProperties": False,
}
ANSWER = json.dumps(
    {
        "name": "dedent",
        "kind": "function",
        "line": 416,
        "arguments": [{"name": "text", "default": None}, {"name": "width", "default": 70}],
        "documentation": "Remove any common leading whitespace from every line.",
    }
)
ENDLESS = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1000}
"""An answer that does not end within the steps that are measured"""
NUM_RUNNING, NUM_STEPS, NUM_PAIRS = 32, 100, 15


def large_tokenizer(size: int) -> Tokenizer:
    """Return a byte-level tokenizer whose vocabulary is ``size`` pieces of the standard library."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = dict.fromkeys(alphabet)
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        for word, _ in split.pre_tokenize_str(file.read_text(encoding="utf-8", errors="replace")):
            for length in range(2, min(len(word), 12) + 1):
                pieces[word[:length]] = None
        if len(pieces) >= size - 1:
            break
    vocab = {piece: i for i, piece in enumerate(itertools.islice(pieces, size - 1))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer.of(backend, {"eos_token": "<|end|>"})


def parts(name: str, tokenizer: Tokenizer) -> None:
    """Print what each part takes over one vocabulary."""
    assert tokenizer.eos_token_id is not None
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=(tokenizer.eos_token_id,))
    grammar = json_schema_grammar(SCHEMA)
    started_s = time.perf_counter()
    indexed = compiler._vocabulary.indexed
    index_ms = (time.perf_counter() - started_s) * 1e3
    compile_ms = [timed(lambda: compiler.compile(grammar)) * 1e3 for _ in range(20)]
    masks_us, commits_us = [], []
    for _ in range(10):
        matcher = compiler.compile(grammar)
        for token_id in indexed.greedy_tokenize(ANSWER):
            masks_us.append(timed(matcher.compute_bitmask) * 1e6)
            commits_us.append(timed(lambda: matcher.consume_token(token_id)) * 1e6)  # noqa: B023 - called at once
        assert matcher.is_accepting()
    followed = GrammarMasks()
    for sequence_id in range(NUM_RUNNING):
        followed.add(sequence_id, compiler.compile(grammar))
    logits = torch.randn(NUM_RUNNING, tokenizer.vocab_size).numpy()

    def apply() -> None:
        masks = followed.finish(pending)
        assert masks is not None
        for row in range(NUM_RUNNING):
            bias = masks.bias_of(row, tokenizer.vocab_size)
            assert bias is not None
            logits[row] += bias

    wholes_us, applies_us = [], []
    for _ in range(50):
        started_s = time.perf_counter()
        pending = followed.begin(range(NUM_RUNNING))
        assert pending is not None
        pending.bias.result()
        wholes_us.append((time.perf_counter() - started_s) * 1e6 / NUM_RUNNING)
        applies_us.append(timed(apply) * 1e6 / NUM_RUNNING)
    print(
        f"| {name}, {tokenizer.vocab_size} tokens | {index_ms:.0f} ms | {statistics.median(compile_ms):.2f} ms "
        f"| {statistics.median(masks_us):.0f} us ({percentile(masks_us, 99):.0f}) "
        f"| {statistics.median(commits_us):.0f} us | {statistics.median(wholes_us):.0f} us "
        f"| {statistics.median(applies_us):.0f} us |"
    )


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile, by the nearest rank."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def step_ms(engine: Engine, grammar: str | None, turn: int) -> float:
    """Return the median step of ``NUM_RUNNING`` requests that all follow ``grammar``, or none, in milliseconds."""
    names = [f"{turn}-{i}" for i in range(NUM_RUNNING)]
    for i, name in enumerate(names):
        sampling = SamplingParams(
            max_tokens=NUM_STEPS + 20, temperature=1.0, seed=i, grammar=grammar, ignore_eos=grammar is None
        )
        request = GenerateRequest(request_id=name, prompt_token_ids=[i + 100] * 64, sampling=sampling)
        engine.add(request, None if grammar is None else engine.grammars.compile(grammar))
    for _ in range(10):
        engine.step()
    steps = [timed(engine.step) * 1e3 for _ in range(NUM_STEPS)]
    for name in names:
        engine.abort(name)
    return statistics.median(steps)


def main() -> None:
    """Measure and print."""
    engine = build_engine(Settings(speculation=SpeculationConfig(method="off")))
    grammar = json_schema_grammar(ENDLESS)
    pairs = [(step_ms(engine, None, 2 * i), step_ms(engine, grammar, 2 * i + 1)) for i in range(NUM_PAIRS + 1)][1:]
    without, following = zip(*pairs, strict=True)
    added_us = [(b - a) * 1e3 / NUM_RUNNING for a, b in pairs]
    print(
        f"{NUM_RUNNING} running, a step: {statistics.median(without):.2f} ms without, "
        f"{statistics.median(following):.2f} ms with a schema; added per request and step "
        f"{statistics.median(added_us):.0f} us ({min(added_us):.0f}..{max(added_us):.0f}), {NUM_PAIRS} pairs by turns\n"
    )
    torch.set_num_threads(1)
    print(
        "| vocabulary | index it, once | compile a schema | a mask, median (p99) | commit a token "
        "| a row's bias, of 32 at once | add it |\n|---|---|---|---|---|---|---|"
    )
    parts("penstock-mini", Tokenizer.load(resolve_model("penstock-mini")))
    parts("as large as Llama 3's", large_tokenizer(128_256))


if __name__ == "__main__":
    thread = compile_thread()
    thread.submit(main).result()
