"""Penstock itself, from this repository's environment, over HTTP."""

import compileall
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.machine import source_commit
from benchmarks.peers.peer import REPOSITORY, Command, Launch, Limits, Peer, free_port

PRECISIONS: dict[str, tuple[str, ...]] = {
    "BF16": (),
    "INT8": ("--quantize", "int8"),
    "INT4": ("--quantize", "int4"),
}
"""What is written beside Penstock's name, and the flags of `penstock serve` it stands for"""


class Penstock(Peer):
    """`penstock serve`: an API process and an engine process."""

    name = "penstock"
    precisions = tuple(PRECISIONS)
    install = ()
    probe = "import penstock; print(penstock.__version__)"

    def prepare(self, environment: Path, precision: str, model: Path, out: Path) -> Sequence[Command]:
        """Nothing: it reads the model directory and quantizes while loading."""
        return ()

    def launch(self, environment: Path, precision: str, model: Path, prepared: Path, limits: Limits) -> Launch:
        """Serve ``model``; ``environment`` does not matter."""
        compile_sources()
        port = free_port()
        command: list[str | Path] = [Path(sys.executable).with_name("penstock"), "serve", model, "--port", str(port)]
        command += ["--threads", str(limits.threads), "--cache-memory", str(limits.cache_bytes)]
        command += ["--max-model-tokens", str(limits.max_model_tokens), "--log-level", "error"]
        # Random weights go round in circles, which would be guessed too well.
        command += ["--speculate", "off"]
        return Launch(command=[*command, *PRECISIONS[precision]], port=port)

    def version(self, environment: Path) -> str:
        """Return the version and the commit of this repository."""
        from penstock import __version__

        return f"{__version__} at {source_commit()}"


def compile_sources() -> None:
    """Compile what has changed of this repository's modules, as installing a package does.

    Else every start would where PYTHONDONTWRITEBYTECODE is set, and otherwise the first after each change.
    """
    compileall.compile_dir(REPOSITORY / "src" / "penstock", quiet=1)
