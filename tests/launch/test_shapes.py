"""A model that is only a shape, served and measured."""

import json
from pathlib import Path

import httpx

from penstock.launch.settings import ModelSettings
from penstock.launch.text import load_template, load_tokenizer
from tests.commands import run, serving

MODEL = "shape:llama-0.1b"


def test_a_shape_reads_text_as_the_demo_model_does_and_writes_every_id() -> None:
    ours, demos = load_tokenizer(ModelSettings(name=MODEL)), load_tokenizer(ModelSettings())
    text = "def main(): <7000>"
    ids = demos.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=False) == ids
    assert ours.decode([*ids, 31_999]) == f"{text}<31999>"
    assert (ours.vocab_size, ours.special_tokens) == (32_000, demos.special_tokens)
    assert load_template(ModelSettings(name=MODEL)) is not None


def test_a_shape_is_served() -> None:
    with serving(MODEL, "--max-model-len", "64") as server:
        body = {"prompt": [1, 2, 31_000], "max_tokens": 8, "ignore_eos": True, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        assert answer["model"] == MODEL
        assert answer["usage"]["completion_tokens"] == 8
        assert "<" in answer["choices"][0]["text"]


def test_bench_runs_a_shape_with_room_for_what_it_asks(tmp_path: Path) -> None:
    sizes = ["--num-requests", "2", "--repetitions", "1", "--warmup", "0", "--prompt-tokens", "300"]
    trace = tmp_path / "trace.json"
    options = ["--output-tokens", "3", "--threads", "1", "--dtype", "bfloat16", "--json", "--profile", str(trace)]
    result = run("bench", "--shape", "llama-0.1b", *sizes, *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["target"] == MODEL
    (measured,) = report["runs"]
    assert measured["num_prompt_tokens"] == 600
    assert measured["prompt_tokens_per_s"] > measured["output_tokens_per_s"] > 0
    assert measured["stream_tokens_per_s"] > 0
    assert {steps["kind"] for steps in report["profile"]["kinds"]} == {"decode", "prefill"}
    assert len(json.loads(trace.read_text())["traceEvents"]) > 100


def test_what_cannot_be_is_said_in_a_line() -> None:
    unknown = run("bench", "--shape", "llama-99b")
    assert unknown.returncode == 1
    assert "there is no shape 'llama-99b'" in unknown.stderr
    both = run("bench", "penstock-mini", "--shape", "llama-0.1b")
    assert both.returncode == 2
    in_vain = run("bench", "http://127.0.0.1:9", "--quantize", "int8")
    assert in_vain.returncode == 2
    assert "--quantize" in in_vain.stderr
    in_vain = run("bench", "http://127.0.0.1:9", "--profile", "trace.json")
    assert in_vain.returncode == 2
    too_long = run("bench", "--prompt-tokens", "9999", "--num-requests", "1")
    assert too_long.returncode == 1
    assert "was made for" in too_long.stderr
