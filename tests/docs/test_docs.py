"""The documentation says what the code does: reference pages are the code's own, and every snippet runs."""

import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from docs.generate import PAGES, REFERENCE
from penstock.compress.recipe import parse_recipe, resolve
from penstock.compress.units import ends_of, units_of
from penstock.eval import load_tasks
from penstock.models import families, read_config, resolve_model
from penstock.protocol import EngineState
from penstock.quant import Scheme
from tests.commands import PENSTOCK, Server, run, run_here, serving
from tests.gguf_files import write_gguf
from tests.quantized_files import quantize_checkpoint

ROOT = Path(__file__).parents[2]
PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE_MODEL = "/models/Qwen2.5-0.5B-Instruct"
EXAMPLE_SEEING_MODEL = "/models/SmolVLM-256M-Instruct"
EXAMPLE_GGUF = f"{EXAMPLE_MODEL}/model-q4_k_m.gguf"
EXAMPLE_AWQ = "/models/Qwen2.5-7B-Instruct-AWQ"
EXAMPLE_URL = "http://127.0.0.1:8000"


def snippets() -> Iterator[tuple[str, str]]:
    """Yield (file:line, text) of each indented or fenced block; a new command begins a new one."""
    for file in PROSE:
        lines = file.read_text(encoding="utf-8").splitlines()
        block: list[str] = []
        fenced = False
        for number, line in enumerate([*lines, ""], start=1):
            if line.startswith("```"):
                fenced = not fenced
                if not fenced:
                    yield f"{file.name}:{number}", "\n".join(block)
                    block = []
                else:
                    block = [f"#{language}"] if (language := line.removeprefix("```")) else []
                continue
            if fenced:
                block.append(line)
                continue
            is_new = re.match(r" {4}(curl|make|penstock)\b", line)
            if block and (is_new or not line.startswith("    ")):
                yield f"{file.name}:{number}", "\n".join(block)
                block = []
            if is_new or (block and line.startswith("    ")):
                block.append(line[4:])


SNIPPETS = list(snippets())


def run_snippets(kind: str) -> list[pytest.param]:  # type: ignore[valid-type]
    return [pytest.param(text, id=place) for place, text in SNIPPETS if text.startswith(kind)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def test_every_snippet_is_of_a_kind_that_is_tested() -> None:
    commands = ("serve ", "chat ", "bench ", "config ", "eval", "compress ", "distill ", "models ")
    kinds = ("make ", "curl ", *(f"penstock {command}" for command in commands), "#python", "#yaml")
    assert len(SNIPPETS) > 10
    for place, text in SNIPPETS:
        assert text.startswith(kinds), (place, text)


@pytest.mark.parametrize("page", PAGES)
def test_reference_is_what_the_code_says(page: str) -> None:
    written = (REFERENCE / page).read_text(encoding="utf-8")
    assert written == PAGES[page](), "run: python -m docs.generate"


def test_reference_has_no_page_of_nothing() -> None:
    assert {file.name for file in REFERENCE.iterdir()} == set(PAGES)


@pytest.mark.parametrize("file", PROSE, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


@pytest.mark.parametrize("file", PROSE, ids=lambda file: file.name)
def test_flags_settings_and_metrics_in_prose_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    commands, settings, metrics = (PAGES[f"{name}.md"]() for name in ("command-line", "settings", "metrics"))
    ours = re.sub(r"`python -m [^`]*`", "", text)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) - {"--strict"}:
        assert f"`{flag}`" in commands, flag
    for name in set(re.findall(r"`((?:vllm:|penstock_)\w+)`", text)):
        assert f"`{name.removesuffix('_total')}`" in metrics, name
    for section, key in re.findall(r"`(server|images|scheduler|cache|runner|registry|log|model)\.(\w+)`", text):
        if key != "safetensors":
            assert f"`{key}`" in settings, (section, key)


def test_the_example_family_is_the_code() -> None:
    shown = textwrap.indent(inspect.getsource(families.granite), "    ")
    assert shown in (ROOT / "docs/adding-a-model.md").read_text(encoding="utf-8")


def test_states_in_the_operating_guide_exist() -> None:
    text = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    for state in ("loading", "restarting", "stalled", "draining", "failed"):
        assert f"`{state}`" in text
        assert EngineState(state)


@pytest.mark.parametrize("text", run_snippets("make "))
def test_make_targets_exist(text: str) -> None:
    target = text.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("text", run_snippets("curl "))
def test_curl(text: str, server: Server) -> None:
    command = text.replace(EXAMPLE_URL, server.url)
    result = subprocess.run(
        ["bash", "-c", f"{command} --fail-with-body -sS"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("text", run_snippets("#python"))
def test_python(text: str, server: Server) -> None:
    result = subprocess.run(
        [sys.executable, "-c", text.replace(EXAMPLE_URL, server.url)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("text", run_snippets("penstock serve "))
def test_serve(
    text: str,
    checkpoint: Callable[[str], Path],
    seeing_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = checkpoint("qwen3")
    if EXAMPLE_SEEING_MODEL in text:
        text = text.replace(EXAMPLE_SEEING_MODEL, str(seeing_checkpoint("smolvlm")))
    if EXAMPLE_AWQ in text:
        coded, _ = quantize_checkpoint(model, tmp_path, lambda _: Scheme(bits=4, group=32), "awq")
        text = text.replace(EXAMPLE_AWQ, str(coded))
    if EXAMPLE_GGUF in text and not (model / "model.gguf").exists():
        write_gguf(model, model / "model.gguf", "qwen3")
    if "registry:" in text:
        monkeypatch.setenv("PENSTOCK__REGISTRY__URL", f"sqlite:///{tmp_path}/registry.db")
        name = text.split("registry:")[1].split("@")[0]
        assert run("models", "add", str(model), "--name", name).returncode == 0
        assert run("models", "stage", f"{name}:1", "production").returncode == 0
    arguments = text.replace(EXAMPLE_GGUF, f"{model}/model.gguf").replace(EXAMPLE_MODEL, str(model)).split()[2:]
    # A free port instead of the example's.
    at = arguments.index("--port")
    with serving(*arguments[:at], *arguments[at + 2 :]) as running:
        assert httpx.get(f"{running.url}/health/ready").status_code == 200


@pytest.mark.parametrize("text", [*run_snippets("penstock chat "), *run_snippets("penstock config ")])
def test_chat_and_config(text: str, checkpoint: Callable[[str], Path]) -> None:
    arguments = text.replace(EXAMPLE_MODEL, str(checkpoint("qwen2"))).split()[1:]
    result = subprocess.run(
        [*PENSTOCK, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("text", run_snippets("penstock bench "))
def test_bench(text: str, server: Server) -> None:
    few = ["--num-requests", "4", "--repetitions", "1", "--output-tokens", "4", "--prompt-tokens", "8"]
    result = run(*text.replace(EXAMPLE_URL, server.url).split()[1:], *few)
    assert result.returncode == 0, result.stderr
    assert "ttft" in result.stdout.lower() or "first token" in result.stdout.lower()


@pytest.mark.parametrize("text", run_snippets("penstock eval"))
def test_eval(text: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    command = text.replace(EXAMPLE_MODEL, str(checkpoint("qwen2"))).replace("/tmp/penstock-eval", str(tmp_path))
    few = ["--limit", "2", "--window", "128", "--no-speed", "--threads", "1"]
    result = run(*command.split()[1:], *few)
    # A verdict on two windows of random weights may be either.
    assert result.returncode in ((0, 3) if "--against" in text else (0,)), result.stderr
    assert "candidate" in result.stdout
    if "--out" in text:
        assert {file.name for file in tmp_path.iterdir()} == {"report.json", "report.html", "model-card.md"}


@pytest.mark.parametrize("text", run_snippets("penstock compress "))
def test_compress(text: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = text.replace(EXAMPLE_MODEL, str(checkpoint("qwen2"))).replace("/tmp/penstock-4bit", str(out))
    # The texts are nothing to a model of random weights.
    result = run_here(*command.split()[1:], "--samples", "4", "--sample-tokens", "48", "--force")
    assert result.returncode == 0, result.stderr
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("text", run_snippets("penstock distill "))
def test_distill(text: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out, teacher, student = tmp_path / "out", str(checkpoint("qwen2")), str(checkpoint("llama"))
    command = text.replace(EXAMPLE_MODEL, teacher).replace("/tmp/shorter", student).replace("/tmp/student", str(out))
    result = run_here(*command.split()[1:], "--samples", "64", "--sample-tokens", "32", "--steps", "2")
    assert result.returncode == 0, result.stderr
    assert (out / "config.json").is_file()


def test_models(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as they are read: what one registers the next shows."""
    monkeypatch.setenv("PENSTOCK__REGISTRY__URL", f"sqlite:///{tmp_path}/registry.db")
    (tmp_path / "report.json").write_text('{"loss": 3.5}')
    here = {
        EXAMPLE_MODEL: checkpoint("qwen2"),
        "/tmp/penstock-4bit": checkpoint("llama"),
        "/tmp/penstock-eval": tmp_path,
        "/keys": tmp_path,
    }
    # Tracking needs a server, which its own test has.
    commands = (text for _, text in SNIPPETS if text.startswith("penstock models ") and " track " not in text)
    for text in commands:
        for example, path in here.items():
            text = text.replace(example, str(path))
        result = run(*text.split()[1:])
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("text", [text for _, text in SNIPPETS if text.startswith("#yaml") and "steps:" in text])
def test_a_recipe(text: str) -> None:
    config = read_config(resolve_model("penstock-mini"))
    resolved = resolve(parse_recipe(text), [*units_of(config), *ends_of(config)])
    named = set(re.findall(r"method: (\w+)", text))
    # What no step reaches is kept.
    assert {treatment.method for treatment in resolved.values()} | {"keep"} == named | {"keep"}


@pytest.mark.parametrize("text", [text for _, text in SNIPPETS if text.startswith("#yaml") and "remove:" in text])
def test_a_recipe_that_removes(text: str) -> None:
    removal = parse_recipe(text).remove
    assert removal is not None
    assert (removal.layers, removal.channels) == (2, 0.25)


@pytest.mark.parametrize("text", [text for _, text in SNIPPETS if text.startswith("#yaml") and "kind:" in text])
def test_a_task_of_ones_own(text: str, tmp_path: Path) -> None:
    line = '{"country": "Peru", "answer": "Lima"}'
    assert line in (ROOT / "docs/evaluating.md").read_text(encoding="utf-8")
    (tmp_path / "capitals.jsonl").write_text(line)
    (tmp_path / "task.yaml").write_text(text)
    (task,) = load_tasks([str(tmp_path / "task.yaml")], window=128)
    assert (task.name, task.kind) == ("capitals", "generation")
