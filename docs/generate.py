"""Write docs/reference from the code: `python -m docs.generate`. A test compares what is there with what this says."""

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from prometheus_client import CollectorRegistry, Metric

from penstock import errors
from penstock.cli.app import app
from penstock.engine.metrics import EngineMetrics
from penstock.http.errors import error_body, status_of
from penstock.http.middleware import HTTPMetrics
from penstock.launch.settings import Settings
from penstock.protocol import EngineState, EngineStatus, MemoryPlan, ModelInfo
from penstock.server.messages.schemas import MessagesRequest
from penstock.server.prompts import PromptsRequest
from penstock.server.responses.schemas import ResponsesRequest
from penstock.server.routes.embedding import EmbeddingsRequest
from penstock.server.routes.ranking import RerankRequest, ScoreRequest
from penstock.server.schemas import LATER, ChatCompletionRequest, CompletionRequest

_A_MODEL = ModelInfo(
    name="",
    source="",
    architecture="",
    dtype="",
    kv_dtype="",
    num_parameters=0,
    vocab_size=0,
    max_model_tokens=0,
    eos_token_ids=(),
    hidden_size=0,
    memory=MemoryPlan(
        weights_bytes=0, activation_peak_bytes=0, block_bytes=0, num_blocks=0, block_size=0, available_bytes=0
    ),
)
REFERENCE = Path(__file__).parent / "reference"


def field_notes(kind: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    notes = {}
    for field, note in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            notes[field.target.id] = " ".join(str(note.value.value).split()).replace("``", "`")
    return notes


def settings_page() -> str:
    """Every setting, from the dataclasses that declare it."""
    lines = [
        "# Settings",
        "",
        "Later sources win: defaults, the settings file (`--config`, else `PENSTOCK_CONFIG`, else `./penstock.toml`), the",
        "environment, flags. `penstock config show` prints each value and where it came from. An unknown setting is",
        "refused by name. Sizes may have units, as in `4GiB`; an unset value is decided at start.",
    ]
    for section in dataclasses.fields(Settings):
        kind = section.default_factory
        assert isinstance(kind, type)
        notes = field_notes(kind)
        lines += ["", f"## [{section.name}]", "", f"{(kind.__doc__ or '').strip()}", ""]
        lines += ["| key | default | environment | what it does |", "|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            default = "unset" if field.default is None else f"`{json.dumps(field.default)}`"
            variable = f"PENSTOCK__{section.name}__{field.name}".upper()
            lines.append(f"| `{field.name}` | {default} | `{variable}` | {notes[field.name]} |")
    return "\n".join(lines) + "\n"


def _metrics() -> Iterator[Metric]:
    registry = CollectorRegistry()
    EngineMetrics(registry).watch(lambda: EngineStatus(state=EngineState.READY, model=_A_MODEL))
    HTTPMetrics(registry)
    yield from sorted(registry.collect(), key=lambda metric: metric.name)


def metrics_page() -> str:
    """Every metric of /metrics that is Penstock's own."""
    lines = [
        "# Metrics",
        "",
        "What `/metrics` exports, in base units. The `vllm:` names are those that dashboards and routers already read.",
        "Counters end in `_total`, histograms in `_bucket`, `_sum` and `_count`. A label takes at most 1,000 values, then",
        "`other`. The process's own metrics (`process_*`, `python_*`) are there as well.",
        "",
        "| name | type | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| `{metric.name}` | {metric.type} | {metric.documentation} |" for metric in _metrics()]
    return "\n".join(lines) + "\n"


def _error_kinds(kind: type[errors.PenstockError]) -> Iterator[type[errors.PenstockError]]:
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from _error_kinds(child)


def errors_page() -> str:
    """Every error, who can act on it and how it looks to a client."""
    lines = [
        "# Errors",
        "",
        'A refused request is answered with `{"error": {"message", "type", "param", "code"}}`. The message gives the fault,',
        "the value seen and the next step; `code` is for programs. Once a stream has begun, the same object comes as one",
        "`error` event. Errors of the operator's are printed by the command that meets them, which ends with status 1.",
        "",
        "| class | code | HTTP status | type | meaning |",
        "|---|---|---|---|---|",
    ]
    for kind in _error_kinds(errors.PenstockError):
        error = kind("")
        is_operators = isinstance(error, errors.ConfigError)
        status = "at start" if is_operators else str(status_of(error))
        wire = "" if is_operators else f"`{error_body(error)['error']['type']}`"
        depth = "&nbsp;&nbsp;" * (len(kind.__mro__) - 5)
        lines.append(f"| {depth}{kind.__name__} | `{kind.code}` | {status} | {wire} | {(kind.__doc__ or '').strip()} |")
    return "\n".join(lines) + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for child in command.commands.values():
            yield from _commands(child, f"{name} {child.name}")
    else:
        yield name, command


def commands_page() -> str:
    """Every command and option."""
    lines = [
        "# The command line",
        "",
        "Every command has `--help`. A usage error ends with status 2, anything else a person can fix with status 1 and one",
        "line that says how.",
    ]
    for name, command in _commands(typer.main.get_command(app), "penstock"):
        arguments = [str(p.metavar) for p in command.params if p.param_type_name == "argument"]
        lines += ["", f"## `{' '.join([name, *arguments])}`", "", (command.help or "").strip(), ""]
        lines += ["| option | what it does |", "|---|---|"]
        for option in command.params:
            if option.param_type_name == "option":
                spelled = ", ".join(f"`{opt}`" for opt in [*option.opts, *option.secondary_opts])
                shown = f" [default: {option.default}]" if isinstance(option.default, str | int | float) else ""
                shown = "" if option.default is False else shown
                lines.append(f"| {spelled} | {' '.join((option.help or '').split())}{shown} |")
    return "\n".join(lines) + "\n"


def parameters_page() -> str:
    """Every parameter of the generating routes, and of those that only read."""
    lines = [
        "# Request parameters",
        "",
        "What `/v1/completions`, `/v1/chat/completions`, `/v1/responses` and `/v1/messages` take. OpenAI's and Anthropic's",
        "parameters mean what they mean there; the others are described in [request options](../request-options.md).",
        "Anything else is refused by name with status 400.",
        "",
        "| parameter | completions | chat | responses | messages |",
        "|---|---|---|---|---|",
    ]
    routes = [
        set(one.model_fields) for one in (CompletionRequest, ChatCompletionRequest, ResponsesRequest, MessagesRequest)
    ]
    lines += [
        f"| `{name}` | {' | '.join('yes' if name in route else '' for route in routes)} |"
        for name in sorted(set().union(*routes))
    ]
    kinds: dict[str, type[PromptsRequest]] = {
        "embeddings": EmbeddingsRequest,
        "score": ScoreRequest,
        "rerank": RerankRequest,
    }
    lines += [
        "",
        "What `/v1/embeddings`, `/v1/score` and `/v1/rerank` take; see [embeddings and ranking](../embeddings-and-ranking.md).",
        "",
        f"| parameter | {' | '.join(kinds)} |",
        "|---|---|---|---|",
    ]
    for name in sorted({name for kind in kinds.values() for name in kind.model_fields}):
        takes = ("yes" if name in kind.model_fields else "" for kind in kinds.values())
        lines.append(f"| `{name}` | {' | '.join(takes)} |")
    later = ", ".join(f"`{name}`" for name in sorted(LATER))
    lines += ["", f"Known, and refused as not supported yet by completions and chat: {later}."]
    only_null = "Those that [ask a server to remember, or to run tools](../responses-and-messages.md) may only be null."
    return "\n".join([*lines, "", only_null]) + "\n"


PAGES = {
    "command-line.md": commands_page,
    "errors.md": errors_page,
    "metrics.md": metrics_page,
    "parameters.md": parameters_page,
    "settings.md": settings_page,
}


def main() -> None:
    """Write all pages."""
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
