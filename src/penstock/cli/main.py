"""``penstock``: the commands and their flags."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import penstock
from penstock.errors import PenstockError

if TYPE_CHECKING:
    from penstock.config import Loaded
    from penstock.launch.settings import Settings

app = typer.Typer(
    name="penstock",
    help="Serve language models on ordinary processors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
config_app = typer.Typer(help="Look at settings.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")

Model = Annotated[str | None, typer.Argument(help="A directory, a hub id, or penstock-mini (the default).")]
Target = Annotated[
    str | None, typer.Argument(help="A model (default penstock-mini), or the URL of an OpenAI-compatible server.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
MaxModelTokens = Annotated[
    int | None, typer.Option("--max-model-len", "--max-model-tokens", help="Most tokens of prompt and answer.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads one step uses; default all cores.")]
CacheMemory = Annotated[str | None, typer.Option("--cache-memory", help="Bytes for the KV cache, such as 2GiB.")]


def main() -> None:
    """Run the command line; a fault someone can act on is one line, not a traceback."""
    try:
        app()
    except PenstockError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"penstock {penstock.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def load(config: Path | None, given: dict[str, tuple[str, object]]) -> "Loaded[Settings]":
    """Return settings from file, environment and flags: ``given`` maps a key to its flag and value, None for unset."""
    import os

    from penstock.config import Flag, find_config_file, load_settings
    from penstock.launch.settings import Settings

    flags = {key: Flag(name=name, value=value) for key, (name, value) in given.items() if value is not None}
    return load_settings(
        Settings, file=find_config_file(config, os.environ, Path.cwd()), environ=os.environ, flags=flags
    )


def engine_flags(
    model: str | None, max_model_tokens: int | None, dtype: str | None, threads: int | None, cache_memory: str | None
) -> dict[str, tuple[str, object]]:
    """Return the flags that every command with an engine has, by setting."""
    return {
        "model.name": ("MODEL", model),
        "runner.max_model_tokens": ("--max-model-len", max_model_tokens),
        "runner.dtype": ("--dtype", dtype),
        "runner.threads": ("--threads", threads),
        "cache.memory_bytes": ("--cache-memory", cache_memory),
    }


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on; 0 picks a free one.")] = None,
    served_names: Annotated[
        list[str] | None, typer.Option("--served-model-name", help="Name clients use; may be repeated.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    max_model_tokens: MaxModelTokens = None,
    dtype: Dtype = None,
    threads: Threads = None,
    cache_memory: CacheMemory = None,
    memory_share: Annotated[
        float | None, typer.Option("--memory-share", help="Share of free memory to use without --cache-memory.")
    ] = None,
    block_size: Annotated[int | None, typer.Option("--block-size", help="Tokens per cache block.")] = None,
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="Do not reuse the cache of shared beginnings.")
    ] = False,
    step_tokens: Annotated[int | None, typer.Option("--step-tokens", help="Tokens one step may process.")] = None,
    max_running: Annotated[int | None, typer.Option("--max-running", help="Sequences that run at once.")] = None,
    max_waiting: Annotated[int | None, typer.Option("--max-waiting", help="Requests that may queue.")] = None,
    drain_timeout_s: Annotated[
        float | None, typer.Option("--drain-timeout", help="Seconds that stopping waits for running requests.")
    ] = None,
    config: ConfigFile = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option("--log-format", help="auto, console or json.")] = None,
) -> None:
    """Serve a model through the OpenAI API."""
    given = engine_flags(model, max_model_tokens, dtype, threads, cache_memory) | {
        "server.host": ("--host", host),
        "server.port": ("--port", port),
        "server.served_names": ("--served-model-name", served_names or None),
        "server.drain_timeout_s": ("--drain-timeout", drain_timeout_s),
        "model.revision": ("--revision", revision),
        "cache.memory_share": ("--memory-share", memory_share),
        "cache.block_size": ("--block-size", block_size),
        "cache.prefix_caching": ("--no-prefix-caching", False if no_prefix_caching else None),
        "scheduler.step_tokens": ("--step-tokens", step_tokens),
        "scheduler.max_running": ("--max-running", max_running),
        "scheduler.max_waiting": ("--max-waiting", max_waiting),
        "log.level": ("--log-level", log_level),
        "log.format": ("--log-format", log_format),
    }
    settings = load(config, given).settings
    from penstock.launch.serve import serve as run

    run(settings)


@config_app.command("show")
def config_show(
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print each setting's value and where it came from."""
    import msgspec

    values = load(config, {}).values
    if as_json:
        rows = {row.key: {"value": row.value, "origin": row.origin} for row in values}
        typer.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return
    shown = [(row.key, msgspec.json.encode(row.value).decode(), row.origin) for row in values]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    for key, value, origin in shown:
        typer.echo(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")
