"""`penstock distill` as a person types it."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.commands import run, run_here
from tests.tiny_models import make_checkpoint


def test_a_smaller_model_learns_and_is_served_beside_its_teacher(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    words = ["import", "return", "class", "None", "self", "yield"]
    lines = [" ".join(words[(i * i + j * (i + 1)) % 6] for j in range(12)) for i in range(40)]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    student = make_checkpoint(tmp_path / "student", "llama", num_hidden_layers=1)
    teacher, out = str(checkpoint("llama")), tmp_path / "out"
    command = ["distill", str(student), "--teacher", teacher, "--texts", str(texts), "--steps", "3", "--batch", "2"]
    result = run(*command, "--out", str(out), "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["first_step"] == 0
    assert answer["after"]["value"] != answer["before"]["value"]
    assert "recovered" in result.stderr
    again = run_here(*command, "--out", str(out))
    assert again.returncode == 1
    assert "exists" in again.stderr
