"""transformers' continuous batching, in a process of its own without HTTP."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import Command, Launch, Limits, Peer, worker_command


class Transformers(Peer):
    """What `generate_batch` runs on: the continuous batching manager."""

    name = "transformers"
    precisions = ("BF16",)
    install = ("pip install torch==2.13.0", "pip install transformers==5.23.0 accelerate psutil")
    probe = "import transformers; print(transformers.__version__)"

    def prepare(self, environment: Path, precision: str, model: Path, out: Path) -> Sequence[Command]:
        """Nothing: it reads the model directory."""
        return ()

    def launch(self, environment: Path, precision: str, model: Path, prepared: Path, limits: Limits) -> Launch:
        """Run the worker."""
        command = worker_command(environment, "transformers", model, limits.threads, limits.cache_tokens)
        return Launch(command=command, port=None)
