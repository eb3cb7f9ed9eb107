"""llama.cpp's own server, built for this machine from the sources that llama-cpp-python carries.

llama-cpp-python's Python server runs one request at a time behind a lock, so it has no place under load. It is built
without AMX: with it, loading Q4_0 or Q8_0 ended in an invalid instruction on a Granite Rapids, at its first tile.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.peer import REPOSITORY, Command, Launch, Limits, Peer, free_port

_SOURCES = "llama-cpp-python==0.3.36"
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


class LlamaCpp(Peer):
    """`llama-server` on GGUF files; Q4_0 keeps the tied head in Q6_K, as `llama-quantize` does by default."""

    name = "llama.cpp"
    precisions = ("Q4_0", "Q8_0", "BF16")
    install = (
        "pip install gguf==0.19.0 numpy",
        f"pip download --no-deps --no-binary llama-cpp-python -d src {_SOURCES}",
        "tar -xzf src/llama_cpp_python-0.3.36.tar.gz -C src --strip-components=1",
        "cmake -S src/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF"
        f" -DCMAKE_C_FLAGS='{_NO_AMX}' -DCMAKE_CXX_FLAGS='{_NO_AMX}'",
        "cmake --build build -j 4 --target llama-server llama-quantize",
    )
    probe = (
        "import subprocess, gguf; "
        "done = subprocess.run(['build/bin/llama-server', '--version'], capture_output=True, text=True, check=True); "
        f"print('{_SOURCES},', (done.stdout + done.stderr).split('built')[0].strip())"
    )

    def prepare(self, environment: Path, precision: str, model: Path, out: Path) -> Sequence[Command]:
        """Write BF16, and quantize that."""
        bf16 = out / "BF16.gguf"
        script = REPOSITORY / "benchmarks/peers/convert/gguf.py"
        convert: Command = [environment / "bin/python", script, model, bf16]
        if precision == "BF16":
            return [convert]
        quantize: Command = [environment / "build/bin/llama-quantize", bf16, out / f"{precision}.gguf", precision]
        return [convert, quantize, ["rm", bf16]]

    def launch(self, environment: Path, precision: str, model: Path, prepared: Path, limits: Limits) -> Launch:
        """Serve with a slot for each request and one cache shared by all slots."""
        port = free_port()
        options = {
            "--model": prepared / f"{precision}.gguf",
            "--port": port,
            "--threads": limits.threads,
            "--threads-batch": limits.threads,
            "--threads-http": limits.max_running + 2,
            "--parallel": limits.max_running,
            "--ctx-size": limits.cache_tokens,
            "--cache-ram": 0,
        }
        words = [str(word) for option in options.items() for word in option]
        return Launch(
            command=[environment / "build/bin/llama-server", *words, "--kv-unified", "--no-webui"],
            port=port,
            body={"cache_prompt": False},
        )
