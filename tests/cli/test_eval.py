"""`penstock eval` as a person types it."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands import PENSTOCK, run, run_here

FEW = ["--task", "source", "--window", "256", "--limit", "4", "--no-speed", "--threads", "1"]


def test_a_comparison_that_fails_ends_with_3_and_says_why() -> None:
    result = run("eval", "penstock-mini", "--quantize", "int4", "--against", "penstock-mini", *FEW)
    assert result.returncode == 3, result.stderr
    assert "verdict    FAIL" in result.stdout
    assert "source: rise of the loss is" in result.stdout
    assert "KL divergence" in result.stdout


def test_a_model_passes_against_itself_and_json_has_all_of_it() -> None:
    few = ["--limit", "3", "--window", "128", "--threads", "1", "--json", "--within", "loss=0%,kl=0,agreement=100%"]
    result = run("eval", "penstock-mini", "--against", "penstock-mini", *few)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"]["passed"] is True
    assert [task["name"] for task in report["tasks"]] == ["source", "docstrings", "recall", "signatures"]
    for task in report["tasks"]:
        assert task["num_items"] == 3
        assert len(task["data_sha256"]) == 64
        for figure in task["figures"]:
            assert figure["difference"]["value"] == 0
            assert figure["candidate"] == figure["reference"]
    assert report["closeness"]["kl"]["value"] == 0
    assert report["closeness"]["layer_errors"] == [0.0] * 7
    speed = report["speed"]
    assert speed["candidate"]["tokens_per_s"]["median"] > 0
    ratio = speed["tokens_per_s_ratio"]
    assert ratio["least"] <= ratio["median"] <= ratio["most"]


def test_one_model_by_itself_has_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("def f(x):\n    return x\n" * 100)
    result = run("eval", "--task", str(tmp_path / "words.txt"), "--window", "64", "--no-speed", "--threads", "1")
    assert result.returncode == 0, result.stderr
    assert "words.txt" in result.stdout
    assert "token perplexity" in result.stdout
    assert "word perplexity" in result.stdout
    assert "verdict" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--against-quantize", "int8"], 2, "name it with --against"),
        (["--within", "loss=1%"], 2, "name the reference with --against"),
        (["--against", "penstock-mini", "--within", "los=1%"], 2, "los=1%"),
        (["--against", "penstock-mini", "--task", "signatures"], 2, "nothing would be measured"),
        (["--task", "sourse"], 1, "there is no task 'sourse'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(arguments: list[str], status: int, complaint: str) -> None:
    result = run_here("eval", *arguments)
    assert result.returncode == status, result.stderr
    assert complaint in " ".join(result.stderr.replace("│", " ").split())


def test_a_window_that_no_text_fills_is_refused() -> None:
    result = run("eval", "--task", __file__, "--window", "2048")
    assert result.returncode == 1, result.stderr
    assert "lower --window to" in result.stderr


def test_ctrl_c_ends_it_and_its_engines() -> None:
    process = subprocess.Popen(
        [*PENSTOCK, "eval", "--task", "source", "--threads", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    engines: list[str] = []
    deadline = time.monotonic() + 60
    while not engines and time.monotonic() < deadline:
        engines = children.read_text().split()
    assert engines
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, 3)
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in engines)
