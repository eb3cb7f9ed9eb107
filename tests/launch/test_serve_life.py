"""The life of `penstock serve`: it answers, drains, survives its engine, and refuses to start with a reason."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from penstock.kernels import describe
from tests.commands import run, serving


def test_the_demo_model_answers_and_the_plan_is_printed() -> None:
    with serving() as server:
        body = {
            "model": "penstock-mini",
            "temperature": 0,
            "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}],
        }
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Remove any common leading whitespace" in answer["choices"][0]["message"]["content"]
        plan = "".join(server.said)
        for word in ("weights", "activation peak", "tokens fit", "left", f"{describe()} kernels"):
            assert word in plan


def test_without_native_kernels_it_runs_and_says_so(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    with serving(str(checkpoint("llama"))) as server:
        assert "no native kernels" in "".join(server.said)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=60)
        assert answer.status_code == 200


@pytest.mark.skipif(describe() == "reference", reason="the native kernels were not built")
def test_text_is_served_without_torch_until_something_takes_it(checkpoint: Callable[[str], Path]) -> None:
    """Which is a third of a second of every start, and a hundred megabytes."""
    with serving(str(checkpoint("llama"))) as server:

        def complete(**more: object) -> dict[str, Any]:
            body = {"prompt": "abc", "max_tokens": 8, "temperature": 0} | more
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            choice: dict[str, Any] = answer.json()["choices"][0]
            return choice

        def has_torch() -> bool:
            return "libtorch" in Path(f"/proc/{server.engine_pid()}/maps").read_text()

        complete(temperature=1, top_p=0.9, min_p=0.01, seed=3)
        complete(temperature=1, typical_p=0.5, bad_words=["ab"], min_tokens=3)
        complete(presence_penalty=0.5, repetition_penalty=1.2, logit_bias={"7": -3.0}, allowed_token_ids=[5, 6, 7])
        complete(structured_outputs={"regex": "[a-z]+"})
        complete(n=3, temperature=1)
        assert complete(logprobs=3)["logprobs"]["token_logprobs"]
        assert httpx.post(f"{server.url}/v1/embeddings", json={"input": "abc"}).status_code == 200
        plain = complete()
        assert not has_torch()
        # Scores of a prompt's tokens are computed by what steps do not repeat.
        assert complete(echo=True, logprobs=1, max_tokens=1)["logprobs"]["token_logprobs"][1] < 0
        assert has_torch()
        assert complete() == plain


@pytest.mark.skipif(describe() == "reference", reason="the native kernels were not built")
def test_quantized_the_demo_model_still_knows_its_answers() -> None:
    with serving("--quantize", "int8") as server:
        body = {"temperature": 0, "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Remove any common leading whitespace" in answer["choices"][0]["message"]["content"]
        assert "int8" in "".join(server.said)


def test_with_its_cache_in_8_bits_the_demo_model_still_knows_its_answers() -> None:
    with serving("--kv-dtype", "int8") as server:
        body = {"temperature": 0, "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Remove any common leading whitespace" in answer["choices"][0]["message"]["content"]
        assert "int8 cache" in "".join(server.said)


def test_sigterm_finishes_what_runs(checkpoint: Callable[[str], Path]) -> None:
    with serving(str(checkpoint("llama"))) as server:
        body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(30) == 0


LONG = {"prompt": "def main():", "max_tokens": 2000, "ignore_eos": True, "stream": True}
"""Some seconds of work for the demo model."""


def test_draining_takes_nothing_new_and_a_second_signal_stops_at_once() -> None:
    with serving() as server:
        engine = psutil.Process(server.engine_pid())
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/health/ready").status_code == 200:
                pass
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(f"{server.url}/health/live").status_code == 200
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert error["message"]
        assert error["code"] == "draining"
        assert server.process.wait(10) == 0
        engine.wait(10)


def test_an_engine_does_not_outlive_a_killed_server() -> None:
    with serving() as server:
        engine = psutil.Process(server.engine_pid())
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
            next(response.iter_lines())
            server.process.kill()
            engine.wait(30)


def test_a_port_in_use_is_named_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "--port", port)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "--port" in result.stderr
    assert "loading" not in result.stderr


def test_kill_9_of_the_engine_mid_stream() -> None:
    with serving() as server:
        engine_pid = server.engine_pid()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(engine_pid, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert '"code":"worker_died"' in rest[-1]
        states = set()
        while (ready := httpx.get(f"{server.url}/health/ready")).status_code != 200:
            states.add(ready.json()["status"])
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)
            assert refused.status_code in (200, 503)
        assert states <= {"restarting"}
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=60)
        assert answer.status_code == 200
        assert "penstock_engine_restarts_total 1.0" in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-model-len", "4096"], "was made for 2048"),
        (["--cache-memory", "1KiB"], "needs"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["--quantize", "int3"], "quantize is 'int3'"),
        (["--kv-dtype", "int3"], "kv_dtype is 'int3'"),
        (["--log-level", "loud"], "log.level is 'loud'"),
        (["--cache-memory", "many"], "cache.memory_bytes"),
        (["--host", "nowhere.invalid"], "address of this machine with --host"),
        (["--host", "192.0.2.1"], "address of this machine with --host"),
        (["--port", "99999"], "server.port cannot be 99999 (flag --port)"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(arguments: list[str], message: str) -> None:
    result = run("serve", "--port", "0", *arguments)
    assert result.returncode == 1, result.stderr
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("damage", ["truncated", "no tokenizer", "architecture"])
def test_a_broken_checkpoint_is_one_line(damage: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for file in checkpoint("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    match damage:
        case "truncated":
            weights = tmp_path / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:5000])
            message = "broken or cut short"
        case "no tokenizer":
            (tmp_path / "tokenizer.json").unlink()
            message = "tokenizer.json"
        case _:
            config = tmp_path / "config.json"
            config.write_text(config.read_text().replace("LlamaForCausalLM", "ParrotForCausalLM"))
            message = "ParrotForCausalLM"
    result = run("serve", str(tmp_path), "--port", "0")
    assert result.returncode == 1, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_options_are_usage_errors() -> None:
    assert run("serve", "--no-such-flag").returncode == 2
    assert run("bench", "--concurrency", "2", "--rate", "3").returncode == 2
