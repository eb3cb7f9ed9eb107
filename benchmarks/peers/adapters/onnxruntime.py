"""ONNX Runtime GenAI's engine, in a process of its own without HTTP: the package has no server."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import Command, Launch, Limits, Peer, worker_command


class OnnxRuntime(Peer):
    """`Engine` on what its model builder makes for CPUs."""

    name = "onnxruntime"
    precisions = ("INT4",)
    install = (
        "pip install torch==2.13.0",
        "pip install onnxruntime-genai==0.18.0 onnx==1.23.2 onnx-ir==1.1.0 transformers==5.23.0",
    )
    probe = "from importlib.metadata import version; print('onnxruntime-genai', version('onnxruntime-genai'))"

    def prepare(self, environment: Path, precision: str, model: Path, out: Path) -> Sequence[Command]:
        """Build with its own builder, from the same environment."""
        builder: Command = [environment / "bin/python", "-m", "onnxruntime_genai.models.builder"]
        cache = out.with_suffix(".cache")
        build: Command = [*builder, "-i", model, "-o", out, "-c", cache, "-p", precision.lower(), "-e", "cpu"]
        return [build, ["rm", "-r", "-f", cache]]

    def launch(self, environment: Path, precision: str, model: Path, prepared: Path, limits: Limits) -> Launch:
        """Run the worker."""
        command = worker_command(environment, "onnxruntime", prepared, limits.threads, limits.max_running)
        return Launch(command=command, port=None)
