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


# Not its command line, which first reads thousands of tasks of its own.
EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

tasks = TaskManager(include_path=sys.argv[1], include_defaults=False)
for arguments in sys.argv[2:]:
    found = simple_evaluate("local-completions", model_args=arguments, tasks=["choices"], task_manager=tasks)
    print(json.dumps({"score": found["results"]["choices"]["acc,none"], "samples": found["samples"]["choices"]}))
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
def test_the_same_score_as_in_process(server: RunningServer, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint("llama")
    data = tmp_path / "choices.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in QUESTIONS), encoding="utf-8")
    (tmp_path / "choices.yaml").write_text(TASK.format(data=data))
    arguments = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(path),
        "num_concurrent": 4,
        "max_retries": 1,
    }
    shared = ",".join(f"{name}={value}" for name, value in arguments.items())
    both = [f"{shared},tokenized_requests={sends_tokens}" for sends_tokens in (True, False)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(tmp_path), *both],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]

    tokenizer = Tokenizer.load(path)
    expected = [
        [log_likelihood(path, tokenizer, one["question"], f" {choice}") for choice in one["choices"]]
        for one in QUESTIONS
    ]
    right = [
        max(range(len(choices)), key=lambda i: choices[i][0]) == one["answer"]
        for one, choices in zip(QUESTIONS, expected, strict=True)
    ]
    assert 0 < sum(right) < len(right), "a score that all models have would show nothing"
    of_tokens, of_texts = map(json.loads, ran.stdout.splitlines()[-2:])
    for found in (of_tokens, of_texts):
        by_id: dict[int, Any] = {one["doc_id"]: one for one in found["samples"]}
        assert len(by_id) == len(QUESTIONS)
        for place, choices in enumerate(expected):
            seen = by_id[place]["filtered_resps"]
            assert [is_own for _, is_own in seen] == [is_own for _, is_own in choices]
            assert [score for score, _ in seen] == pytest.approx([score for score, _ in choices], abs=2e-3)
        assert found["score"] == pytest.approx(sum(right) / len(right))
