"""lm-eval's own backend against a server: the same choices as the model makes in this process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.text import Tokenizer
from tests.servers import RunningServer
from tests.tiny_models import reference_logits

QUESTIONS: list[dict[str, Any]] = [
    {"question": "def f(x):", "choices": ["return x", "pass", "import os"], "answer": 0},
    {"question": "The sky is", "choices": ["blue", "made of soup", "7"], "answer": 0},
    {"question": "Größe:", "choices": ["klein", "groß", "👍"], "answer": 1},
    {"question": "1 + 1 =", "choices": ["2", "11", "0"], "answer": 0},
    {"question": "a" * 60, "choices": ["a", "b", "aaaa"], "answer": 2},
    {"question": "x", "choices": ["yes", "no", "maybe"], "answer": 1},
]
TASK = """
task: choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def log_likelihood(path: Path, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Return what the model of a checkpoint gives a continuation, and whether it would have said so itself."""
    num_context = len(tokenizer.encode(context, add_special_tokens=False))
    token_ids = tokenizer.encode(context + continuation, add_special_tokens=False)
    logprobs = torch.log_softmax(reference_logits(path, token_ids), dim=-1)
    rows = range(num_context, len(token_ids))
    own = [int(logprobs[row - 1].argmax()) for row in rows]
    return float(sum(logprobs[row - 1, token_ids[row]] for row in rows)), own == token_ids[num_context:]


@pytest.mark.slow
@pytest.mark.parametrize("sends_tokens", [True, False])
def test_the_same_score_as_in_process(
    server: RunningServer, checkpoint: Callable[[str], Path], tmp_path: Path, sends_tokens: bool
) -> None:
    path = checkpoint("llama")
    data = tmp_path / "choices.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in QUESTIONS), encoding="utf-8")
    (tmp_path / "choices.yaml").write_text(TASK.format(data=data))
    arguments = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(path),
        "tokenized_requests": sends_tokens,
        "num_concurrent": 4,
        "max_retries": 1,
    }
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "choices"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")

    tokenizer = Tokenizer.load(path)
    expected = [
        [log_likelihood(path, tokenizer, one["question"], f" {choice}") for choice in one["choices"]]
        for one in QUESTIONS
    ]
    by_id: dict[int, Any] = {one["doc_id"]: one for one in map(json.loads, samples.read_text().splitlines())}
    assert len(by_id) == len(QUESTIONS)
    for place, choices in enumerate(expected):
        seen = [(float(score), str(is_own) == "True") for score, is_own in by_id[place]["filtered_resps"]]
        assert [is_own for _, is_own in seen] == [is_own for _, is_own in choices]
        assert [score for score, _ in seen] == pytest.approx([score for score, _ in choices], abs=2e-3)
    right = [
        max(range(len(choices)), key=lambda i: choices[i][0]) == one["answer"]
        for one, choices in zip(QUESTIONS, expected, strict=True)
    ]
    assert 0 < sum(right) < len(right), "a score that all models have would show nothing"
    score = json.loads(results.read_text())["results"]["choices"]["acc,none"]
    assert score == pytest.approx(sum(right) / len(right))
