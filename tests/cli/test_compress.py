"""`penstock compress` as a person types it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.compress.recipe import NAMED
from tests.commands import run, run_here

FEW = ["--samples", "4", "--sample-tokens", "48", "--force"]


def test_a_recipe_is_shown_followed_and_reported(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n  - {match: attention, method: gptq, group: 32}\n")
    command = ["compress", str(checkpoint("llama")), "-o", str(tmp_path / "out"), "--recipe", str(recipe), *FEW]
    planned = run_here(*command, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "gptq 4 bits, g32" in planned.stdout
    assert "estimate" in planned.stdout
    assert not (tmp_path / "out").exists()
    result = run(*command, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [row["treatment"] for row in answer["coverage"]] == ["gptq 4 bits, g32", "kept", "kept", "kept", "kept"]
    assert answer["report"]["bytes_after"] < answer["report"]["bytes_before"]
    assert [unit["bits"] for unit in answer["report"]["units"]] == [4] * 4
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--recipe", "w2"], "there is no recipe 'w2'"),
        (["--layout", "gguf"], "there is no layout 'gguf'"),
        (["--recipe", "w8a8-smooth", "--layout", "gptq"], "write compressed-tensors instead"),
        (["--calibration", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], complaint: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    result = run_here("compress", str(checkpoint("llama")), "-o", str(tmp_path / "out"), *FEW, *arguments)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_found_for_a_size(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "out"
    command = ["compress", str(model), *FEW]
    planned = run_here(*command, "-o", str(out), "--max-loss", "1%", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    reach = json.loads(planned.stdout)
    target = (reach["smallest_bytes"] + reach["largest_bytes"]) // 2
    result = run_here(*command, "-o", str(out), "--target-size", f"{target / 1000}kB", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["report"]["bytes_after"] <= target
    assert "rank correlation with the KL" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # The recipe is one like any other.
    again = run_here(*command, "-o", str(tmp_path / "again"), "--recipe", str(out / "recipe.yaml"))
    assert again.returncode == 0, again.stderr
    first, second = ((path / "model.safetensors").read_bytes() for path in (out, tmp_path / "again"))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--target-size", "1kB"], 1, "1,000 bytes cannot be reached"),
        (["--target-size", "small"], 2, "is not a size"),
        (["--max-loss", "0.01"], 2, "is not a percentage"),
        (["--max-loss", "1%", "--recipe", "int8"], 2, "exclude each other"),
    ],
)
def test_goals_that_cannot_be_reached_are_refused(
    arguments: list[str], status: int, complaint: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    result = run_here("compress", str(checkpoint("llama")), "-o", str(tmp_path / "out"), *FEW, *arguments)
    assert result.returncode == status
    assert complaint in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_no_name_is_cut_in_a_file(seeing_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out, model = str(tmp_path / "out"), str(seeing_checkpoint("smolvlm"))
    planned = run_here("compress", model, "-o", out, *FEW, "--dry-run").stdout
    parts = [line.split("  ")[0] for line in planned.splitlines()]
    assert {"vision_encoder", "norms and biases"} <= set(parts)


def test_help_names_every_recipe() -> None:
    said = "".join(run_here("compress", "--help").stdout.split())
    assert [name for name in NAMED if name not in said] == []
