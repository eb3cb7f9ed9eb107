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
    code = (
        "import penstock.cli.app, penstock.launch.serve, penstock.launch.server, penstock.launch.text\n"
        "import penstock.launch.images, penstock.server.app, uvicorn"
    )
    unneeded = "torch safetensors transformers huggingface_hub matplotlib sqlalchemy cryptography numpy PIL aiohttp"
    assert _imported(code, unneeded) == []


def test_an_engine_needs_no_server() -> None:
    code = (
        "import penstock.launch.worker\n"
        "from penstock.lean_torch import defer_tracing; defer_tracing()\n"
        "import penstock.launch.engine, penstock.engine.host"
    )
    server = "fastapi starlette pydantic uvicorn aiohttp prometheus_client typer"
    never = "transformers huggingface_hub matplotlib tokenizers"
    assert _imported(code, f"{server} {never}") == []


def test_an_engine_answers_with_a_lean_torch() -> None:
    code = (
        "import asyncio\n"
        "from penstock.lean_torch import defer_tracing; defer_tracing()\n"
        "from penstock.launch.local import open_engine\n"
        "from penstock.launch.settings import ModelSettings, Settings\n"
        "from penstock.protocol import GenerateRequest, SamplingParams\n"
        "async def main():\n"
        "    async with open_engine(Settings(model=ModelSettings(name='penstock-mini'))) as engine:\n"
        "        for sampling in (SamplingParams(max_tokens=2), SamplingParams(max_tokens=2, temperature=0)):\n"
        "            request = GenerateRequest(request_id='one', prompt_token_ids=[1, 2, 3], sampling=sampling)\n"
        "            assert [delta async for delta in engine.client.generate(request)]\n"
        "asyncio.run(main())\n"
        "import sys; print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch._decomp", "torch._export", "torch.fx.graph"} & set(done.stdout.split())


def test_packing_begins_before_torch_is_there() -> None:
    assert _imported("import penstock.launch.ahead", "torch") == []
