"""The command line as a person types it."""

import fcntl
import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import termios
import tomllib
from pathlib import Path

import pytest

from penstock.cli.main import main
from tests.commands import PENSTOCK, run, run_here, serving


def _processor_seconds(command: list[str]) -> float:
    """Return the least of three runs: the first may compile what is imported, as installing does."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize(
    "arguments", [[], ["serve"], ["chat"], ["bench"], ["eval"], ["models", "add"], ["config", "show"]]
)
def test_help_is_instant(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    # 0.3 s on a quiet machine: at most 16 times what an interpreter that does nothing takes; torch takes nearly 100.
    # Of the processor's time, beside one another: others at work make both slower, by three times and more.
    nothing = _processor_seconds([sys.executable, "-c", "pass"])
    assert _processor_seconds([*PENSTOCK, *arguments, "--help"]) < 25 * nothing


def test_help_is_written_out() -> None:
    commands = run_here("--help").stdout
    assert "compress  Make a smaller model, layer by layer.\n" in commands
    assert (
        "..." not in commands.partition("Commands:")[2] + run_here("models", "--help").stdout.partition("Commands:")[2]
    )
    assert "models add [OPTIONS] DIR\n" in run_here("models", "add", "--help").stdout
    assert "models add [OPTIONS] DIR\n" in run_here("models", "add").stderr


def test_config_show_says_where_each_value_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[server]\nport = 9000\n")
    result = subprocess.run(
        [*PENSTOCK, "config", "show", "--json", "--config", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "PENSTOCK__SCHEDULER__STEP_TOKENS": "64"},
        check=True,
    )
    rows = {row["key"]: (row["value"], row["origin"]) for row in json.loads(result.stdout)}
    assert rows["server.port"][0] == 9000
    assert "mine.toml" in rows["server.port"][1]
    assert rows["scheduler.step_tokens"] == (64, "env PENSTOCK__SCHEDULER__STEP_TOKENS")
    assert rows["cache.block_size"] == (16, "default")


def test_config_show_prints_what_a_settings_file_takes(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[server]\nserved_names = ["a", "b"]\n[cache]\nmemory_bytes = "1GiB"\n')
    lines = run("config", "show", "--config", str(file)).stdout.splitlines()
    shown = {line.split()[0]: line.split("  ", 1)[1].strip().rsplit("  ", 1)[0].strip() for line in lines}
    assert shown["model.revision"] == "unset"
    assert shown["server.served_names"] == '["a", "b"]'
    assert shown["cache.memory_bytes"] == "1073741824"
    given = [f"{key} = {value}" for key, value in shown.items() if value != "unset"]
    assert tomllib.loads("\n".join(given))["cache"]["prefix_caching"] is True


def test_unknown_settings_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[server]\nprot = 9000\n")
    result = run("config", "show", "--config", str(file))
    assert result.returncode == 1
    assert "server.prot" in result.stderr
    assert "port" in result.stderr


def test_one_question_one_answer() -> None:
    result = run("chat", "--prompt", "What does os.path.join do?")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Join two or more pathname components")
    assert "tokens/s" in result.stderr


class Terminal:
    """`penstock chat` at a terminal."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            # Who starts the tests in the background has them ignore Ctrl-C, and with them all they start.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [*PENSTOCK, "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self._seen = ""

    def read_until(self, mark: str) -> str:
        """Return what is printed up to ``mark``."""
        while mark not in self._seen:
            assert select.select([self._master], [], [], 60)[0], self._seen
            self._seen += os.read(self._master, 4096).decode()
        before, _, self._seen = self._seen.partition(mark)
        return before

    def type(self, keys: str) -> None:
        """Press keys; ^C and ^D are control characters, as at any terminal."""
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """Return the exit status."""
        status = self.process.wait(30)
        os.close(self._master)
        return status


def test_a_conversation_in_a_terminal_with_a_server() -> None:
    with serving() as server:
        terminal = Terminal(server.url)
        terminal.read_until("> ")
        terminal.type("What does len do?\n")
        terminal.read_until("number of items")
        terminal.read_until("tokens/s")
        terminal.read_until("> ")
        terminal.type("/quit\n")
        assert terminal.end() == 0


def test_ctrl_c_stops_an_answer_and_not_the_conversation() -> None:
    terminal = Terminal("--max-tokens", "1500")
    terminal.read_until("> ")
    terminal.type("/dance\n")
    terminal.read_until("there is no /dance")
    terminal.read_until("> ")
    # Code it was not taught an end of: it goes on for long.
    terminal.type("Complete: class Parser:\\n    def __init__(self):\n")
    terminal.read_until("__init__(self):")  # the terminal's echo, its line's end, and a line of the answer
    terminal.read_until("\n")
    terminal.read_until("\n")
    terminal.type("\x03")
    terminal.read_until("(stopped; Ctrl-D or /quit leaves)")
    terminal.read_until("> ")
    terminal.type("/clear\n")
    terminal.read_until("> ")
    terminal.type("/system Answer in one line.\n")
    terminal.read_until("> ")
    terminal.type("What does len do?\n")
    terminal.read_until("number of items")
    terminal.read_until("tokens/s")
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_servers_cache_is_the_servers_to_choose() -> None:
    result = run("bench", "http://127.0.0.1:1", "--kv-dtype", "int8")
    assert result.returncode == 2
    assert "--kv-dtype is for a model run here" in result.stderr


def test_bench_measures_a_model_and_a_server() -> None:
    sizes = ["--num-requests", "6", "--repetitions", "1", "--warmup", "1", "--prompt-tokens", "8..16"]
    options = [*sizes, "--output-tokens", "4..8", "--json"]
    offline = json.loads(run("bench", *options, "--threads", "1").stdout)
    with serving() as server:
        online = json.loads(run("bench", server.url, *options, "--rate", "50", "--slo", "ttft=10s").stdout)
    for report in (offline, online):
        assert report["conditions"]["workload"]["prompt_tokens"] == {"low": 8, "high": 16}
        assert report["runs"][0]["errors"] == {}
        assert report["runs"][0]["output_tokens_per_s"] > 0
    assert online["runs"][0]["slo_share"] == 1


def test_a_server_that_is_not_there_is_one_line() -> None:
    result = run("chat", "http://127.0.0.1:9", "--prompt", "x")
    assert result.returncode == 1
    assert result.stderr.startswith("error: no OpenAI-compatible server answers")


def test_an_interrupt_before_a_command_has_begun_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def app() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.cli.app.app", app)
    with pytest.raises(SystemExit, match="130"):
        main()
