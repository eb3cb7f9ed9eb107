"""Penstock beside transformers' `generate`, in one run, by turns: `python -m benchmarks.vs_transformers`.

Prompts and answers are uniform in 32..256 tokens, random and the same for both; end of sequence is ignored; float32;
the same threads. Penstock keeps 32 requests running. transformers is measured as padded batches of 32, each as
long as its longest member, and as one request at a time (a few requests, since each takes as long as it takes).
Throughput counts the tokens that were asked for, per second.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from penstock.engine.assemble import assemble_engine
from penstock.engine.config import EngineConfig, SchedulerConfig
from penstock.engine.engine import Engine
from penstock.kernels import describe, use_threads
from penstock.models import resolve_model
from penstock.models.decoder import load_model
from penstock.models.model import LanguageModel
from penstock.protocol import GenerateRequest, MemoryPlan, ModelInfo, SamplingParams
from penstock.text import Tokenizer

CONCURRENCY = 32
NUM_ALONE = 4
Work = list[tuple[list[int], int]]


def draw_work(vocab_size: int, num_requests: int, seed: int) -> Work:
    """Return (prompt, answer length) pairs."""
    draw = random.Random(seed)
    return [
        ([draw.randrange(vocab_size) for _ in range(draw.randint(32, 256))], draw.randint(32, 256))
        for _ in range(num_requests)
    ]


def make_llama(path: Path) -> Path:
    """Write a random Llama of 0.1 billion parameters."""
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def engine_info(path: Path, model: LanguageModel, *, max_model_tokens: int, encoder_cache_bytes: int = 0) -> ModelInfo:
    """Return the description of a model with room for all requests of a benchmark."""
    memory = MemoryPlan(
        weights_bytes=model.weights_bytes,
        activation_peak_bytes=0,
        block_bytes=0,
        num_blocks=2048,
        block_size=16,
        available_bytes=0,
        encoder_cache_bytes=encoder_cache_bytes,
    )
    return ModelInfo(
        name=path.name,
        source=str(path),
        architecture=model.config.architecture,
        dtype="float32",
        kv_dtype="float32",
        num_parameters=model.num_parameters,
        vocab_size=model.config.vocab_size,
        max_model_tokens=max_model_tokens,
        eos_token_ids=(),
        hidden_size=model.config.hidden_size,
        memory=memory,
    )


def make_engine(path: Path) -> Engine:
    """Return an engine with the scheduler's defaults but for 32 running sequences."""
    model = load_model(path, dtype="float32")
    info = engine_info(path, model, max_model_tokens=1024)
    config = EngineConfig(scheduler=SchedulerConfig(max_running=CONCURRENCY))
    return assemble_engine(model, Tokenizer.load(resolve_model("penstock-mini")), config, info=info)


def run_penstock(engine: Engine, work: Work, name: str, threads: int) -> float:
    """Return tokens per second."""
    use_threads(threads)
    began = time.perf_counter()
    for i, (prompt, num_tokens) in enumerate(work):
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        engine.add(GenerateRequest(request_id=f"{name}-{i}", prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work:
        engine.step()
    return sum(num_tokens for _, num_tokens in work) / (time.perf_counter() - began)


@torch.no_grad()
def run_transformers(model: Any, work: Work, batch_size: int, threads: int) -> float:
    """Return tokens per second with left-padded batches, each generating as many tokens as its longest answer."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    for start in range(0, len(work), batch_size):
        batch = work[start : start + batch_size]
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        longest = max(num_tokens for _, num_tokens in batch)
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=longest,
            min_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
        )
    return sum(num_tokens for _, num_tokens in work) / (time.perf_counter() - began)


def measure(name: str, path: Path, num_requests: int, pairs: int, threads: int) -> dict[str, Any]:
    """Alternate the two and return every figure with its spread."""
    engine = make_engine(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    vocab_size = model.config.vocab_size
    warm = [(prompt[:32], 8) for prompt, _ in draw_work(vocab_size, 4, seed=99)]
    run_penstock(engine, warm, "warm", threads)
    run_transformers(model, warm, 4, threads)
    figures: dict[str, list[float]] = {"penstock": [], "padded batches of 32": [], "one at a time": []}
    for pair in range(pairs):
        work = draw_work(vocab_size, num_requests, seed=pair)
        figures["penstock"].append(run_penstock(engine, work, str(pair), threads))
        figures["padded batches of 32"].append(run_transformers(model, work, CONCURRENCY, threads))
        figures["one at a time"].append(run_transformers(model, work[:NUM_ALONE], 1, threads))
        print(name, {form: round(values[-1], 1) for form, values in figures.items()}, flush=True)
    ours = figures["penstock"]
    return {
        "model": name,
        "num_requests": num_requests,
        "tokens_per_s": {
            form: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for form, values in figures.items()
        },
        "ratios": {form: [mine / theirs for mine, theirs in zip(ours, figures[form], strict=True)] for form in figures},
    }


def main() -> None:
    """Measure both models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=["penstock-mini", "llama-0.1b"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.models:
            path = resolve_model(name) if name == "penstock-mini" else make_llama(Path(directory) / name)
            results.append(measure(name, path, arguments.requests, arguments.pairs, arguments.threads))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python -m benchmarks.vs_transformers", *sys.argv[1:]]),
        "machine": {
            "processor": processor(),
            "threads": arguments.threads,
            "kernels": describe(),
            "platform": platform.machine(),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def processor() -> str:
    """Return the processor's name and what of its vector units matters here."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
