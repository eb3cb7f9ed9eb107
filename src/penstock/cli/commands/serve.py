"""`penstock serve`."""

from typing import Annotated

import typer

from penstock.cli.options import (
    ConfigOption,
    DtypeOption,
    KVDtypeOption,
    ModelArgument,
    QuantizeOption,
    RevisionOption,
    ThreadsOption,
)
from penstock.cli.settings import load
from penstock.uncollected import uncollected


def serve(
    model: ModelArgument = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.  [default: 8000]")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name clients call the model by; may be repeated.")
    ] = None,
    revision: RevisionOption = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="hermes, llama3_json or mistral.  [default: as the chat template has it]")
    ] = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    kv_dtype: KVDtypeOption = None,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", "--max-model-tokens", help="Most tokens of a request, prompt and answer."),
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="How embeddings are pooled: mean or last.")] = None,
    max_loras: Annotated[int | None, typer.Option(help="LoRA adapters at once.  [default: 0, none]")] = None,
    threads: ThreadsOption = None,
    encoder_workers: Annotated[
        int | None, typer.Option(help="Processes that encode images beside the engine.  [default: 0, the engine does]")
    ] = None,
    cache_memory: Annotated[str | None, typer.Option(help="Bytes for the KV cache, such as 4GiB.")] = None,
    encoder_cache_memory: Annotated[
        str | None, typer.Option(help="Bytes for what images are encoded to, where the model sees.  [default: 256MiB]")
    ] = None,
    memory_share: Annotated[
        float | None,
        typer.Option(help="Share of free memory to use when --cache-memory is not given.  [default: 0.8]"),
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per cache block.  [default: 16]")] = None,
    prefix_caching: Annotated[
        bool | None,
        typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse computed prefixes.  [default: on]"),
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(help="How to guess tokens ahead: suffix, ngram or draft; answers stay the same.  [default: off]"),
    ] = None,
    speculative_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model of the same vocabulary to guess with.")
    ] = None,
    speculative_tokens: Annotated[int | None, typer.Option(help="Most tokens guessed at a time.  [default: 8]")] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Tokens one step may process.  [default: 512]")] = None,
    encoder_patches: Annotated[
        int | None, typer.Option(help="Patches of images that one step may encode.  [default: 1024]")
    ] = None,
    max_running: Annotated[int | None, typer.Option(help="Sequences that may run at once.  [default: 256]")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may queue.  [default: 1024]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, console or json.")] = None,
    config: ConfigOption = None,
) -> None:
    """Serve a model through the OpenAI API."""
    loaded = load(
        config,
        {
            "model.name": ("MODEL", model),
            "model.revision": ("--revision", revision),
            "server.host": ("--host", host),
            "server.port": ("--port", port),
            "server.served_names": ("--served-model-name", served_model_name or None),
            "server.tool_call_parser": ("--tool-call-parser", tool_call_parser),
            "runner.dtype": ("--dtype", dtype),
            "runner.quantize": ("--quantize", quantize),
            "runner.kv_dtype": ("--kv-dtype", kv_dtype),
            "runner.max_model_tokens": ("--max-model-len", max_model_len),
            "runner.pooling": ("--pooling", pooling),
            "runner.max_adapters": ("--max-loras", max_loras),
            "runner.threads": ("--threads", threads),
            "runner.encoder_workers": ("--encoder-workers", encoder_workers),
            "cache.memory_bytes": ("--cache-memory", cache_memory),
            "cache.encoder_memory_bytes": ("--encoder-cache-memory", encoder_cache_memory),
            "cache.memory_share": ("--memory-share", memory_share),
            "cache.block_size": ("--block-size", block_size),
            "cache.prefix_caching": ("--prefix-caching", prefix_caching),
            "speculation.method": ("--speculate", speculate or ("draft" if speculative_model else None)),
            "speculation.model": ("--speculative-model", speculative_model),
            "speculation.max_tokens": ("--speculative-tokens", speculative_tokens),
            "scheduler.step_tokens": ("--step-tokens", step_tokens),
            "scheduler.encoder_patches": ("--encoder-patches", encoder_patches),
            "scheduler.max_running": ("--max-running", max_running),
            "scheduler.max_waiting": ("--max-waiting", max_waiting),
            "log.level": ("--log-level", log_level),
            "log.format": ("--log-format", log_format),
        },
    )
    with uncollected():
        from penstock.launch import serve as launch

    raise typer.Exit(launch.serve(loaded.settings, launch.to_stderr))
