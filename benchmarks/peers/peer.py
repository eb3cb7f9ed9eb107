"""What a peer has to say about itself so that it can be installed, given the model, started and driven."""

import shlex
import shutil
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

Command = Sequence[str | Path]
REPOSITORY = Path(__file__).resolve().parents[2]
ADAPTERS = Path(__file__).resolve().parent / "adapters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What every system is started with."""

    threads: int
    cache_tokens: int
    kv_bytes_per_token: int
    max_running: int
    max_model_tokens: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of a 16-bit KV cache."""
        return self.cache_tokens * self.kv_bytes_per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a system is started and spoken to."""

    command: Command
    port: int | None
    """Of its OpenAI server; None where it speaks lines on its standard input and output (`workers/lines.py`)."""
    environment: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a completion request that its server wants beside OpenAI's."""


class Peer(ABC):
    """One engine in an environment of its own, in one or several precisions."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    install: ClassVar[tuple[str, ...]]
    """Commands run in turn in a fresh virtual environment's directory, its programs first; words are apart by spaces,
    no shell reads them, and ``{adapters}`` is where the adapters are."""
    probe: ClassVar[str]
    """Python that succeeds in the environment once the peer is installed; it may print the version."""

    @abstractmethod
    def prepare(self, environment: Path, precision: str, model: Path, out: Path) -> Sequence[Command]:
        """Return the commands that turn ``model`` into what this precision runs, in the new directory ``out``."""

    @abstractmethod
    def launch(self, environment: Path, precision: str, model: Path, prepared: Path, limits: Limits) -> Launch:
        """Return how to start it on what ``prepare`` left in ``prepared``."""

    def version(self, environment: Path) -> str:
        """Return what the probe prints. Raises NotInstalled with the reason."""
        python = environment / "bin" / "python"
        if not python.exists():
            raise NotInstalled(f"no environment at {environment}; python -m benchmarks.peers --install {self.name}")
        done = subprocess.run([python, "-c", self.probe], capture_output=True, text=True, cwd=environment, check=False)
        if done.returncode:
            raise NotInstalled(last_line(done.stderr))
        return done.stdout.strip()


class NotInstalled(Exception):
    """A peer cannot be measured here; the message says why."""


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def worker_command(environment: Path, module: str, *arguments: object) -> Command:
    """Return how to run one of `workers/` with the environment's Python."""
    return [environment / "bin" / "python", "-m", f"benchmarks.peers.workers.{module}", *map(str, arguments)]


def install(peer: Peer, environment: Path) -> None:
    """Make the environment anew and run the peer's install commands. Raises NotInstalled at the first that fails."""
    shutil.rmtree(environment, ignore_errors=True)
    environment.mkdir(parents=True)
    _run(f"{sys.executable} -m venv {environment}", environment)
    for line in peer.install:
        _run(line.replace("{adapters}", str(ADAPTERS)), environment)


def _run(line: str, environment: Path) -> None:
    print(f"$ {line}", flush=True)
    program, *arguments = shlex.split(line)
    own = environment / "bin" / program
    command = [own if own.exists() else program, *arguments]
    done = subprocess.run(command, cwd=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise NotInstalled(f"`{line}` failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")
