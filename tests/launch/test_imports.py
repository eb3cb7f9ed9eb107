"""What each process of a server imports: what it does without costs no time at start and no memory."""

import subprocess
import sys


def _imported(code: str, names: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted({name.split(".")[0] for name in done.stdout.split()} & set(names.split()))


def test_a_server_needs_no_tensors() -> None:
    code = "import penstock.cli.main, penstock.launch.serve, penstock.launch.text, penstock.server.app, uvicorn"
    assert _imported(code, "torch safetensors transformers huggingface_hub matplotlib sqlalchemy cryptography") == []


def test_an_engine_needs_no_server() -> None:
    code = (
        "import penstock.launch.worker as worker\n"
        "worker.defer_tracing()\n"
        "import penstock.launch.engine, penstock.engine.host"
    )
    server = "fastapi starlette pydantic uvicorn aiohttp prometheus_client typer"
    never = "transformers huggingface_hub matplotlib"
    assert _imported(code, f"{server} {never}") == []
