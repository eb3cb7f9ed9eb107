"""OpenVINO GenAI's continuous batching, in a process of its own without HTTP: the package has no server."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import Command, Launch, Limits, Peer, worker_command

_BLOCK_TOKENS = 32
"""Of OpenVINO's CPU cache."""


class OpenVino(Peer):
    """`ContinuousBatchingPipeline` on what optimum exports; its cache is in 8 bits, as it is by default."""

    name = "openvino"
    precisions = ("INT8", "INT4")
    install = (
        "pip install openvino-genai==2026.4.1.0",
        "python -m venv convert",
        "convert/bin/python -m pip install torch==2.13.0",
        "convert/bin/python -m pip install optimum-intel==2.2.0 nncf openvino==2026.4.1 openvino-tokenizers",
        "convert/bin/python -m pip uninstall --yes torchvision",
    )
    probe = "import openvino_genai; print(openvino_genai.__version__)"

    def prepare(self, environment: Path, precision: str, model: Path, out: Path) -> Sequence[Command]:
        """Export with optimum, from the environment that has torch."""
        optimum: Command = [environment / "convert/bin/python", "-m", "optimum.commands.optimum_cli"]
        options = ["--task", "text-generation-with-past", "--weight-format", precision.lower()]
        return [[*optimum, "export", "openvino", "--model", model, *options, out]]

    def launch(self, environment: Path, precision: str, model: Path, prepared: Path, limits: Limits) -> Launch:
        """Run the worker."""
        num_blocks = limits.cache_tokens // _BLOCK_TOKENS
        command = worker_command(environment, "openvino", prepared, limits.threads, num_blocks, limits.max_running)
        return Launch(command=command, port=None)
