"""`penstock`: every command, with its work imported only when it runs, so that help is instant."""

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from penstock import __version__
from penstock.cli.models import models_app
from penstock.cli.settings import ConfigOption, load, load_found
from penstock.errors import PenstockError
from penstock.uncollected import uncollected

app = typer.Typer(
    name="penstock",
    help="Serve language models on ordinary machines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at settings.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")

ModelArgument = Annotated[
    Optional[str],  # noqa: UP045 - typer reads this form on every Python
    typer.Argument(metavar="MODEL", help="A directory, a hub id, or penstock-mini (the default)."),
]
TargetArgument = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="MODEL|URL", help="A model to run here (default: penstock-mini), or a server's URL."),
]
ServedModelOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--model", help="Which of the server's models, with a URL.  [default: its first]"),
]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    model: ModelArgument = None,
    host: Annotated[Optional[str], typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,  # noqa: UP045
    port: Annotated[Optional[int], typer.Option(help="Port to listen on.  [default: 8000]")] = None,  # noqa: UP045
    served_model_name: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Name clients call the model by; may be repeated."),
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")] = None,  # noqa: UP045
    tool_call_parser: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="hermes, llama3_json or mistral.  [default: as the chat template has it]"),
    ] = None,
    dtype: Annotated[Optional[str], typer.Option(help="auto, float32, bfloat16 or float16.")] = None,  # noqa: UP045
    quantize: Annotated[Optional[str], typer.Option(help="int8, int4, w8a16 or w4a16: quantize while loading.")] = None,  # noqa: UP045
    kv_dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What keys and values are cached in: auto (the weights' dtype), float32, bfloat16 or int8."),
    ] = None,
    max_model_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-model-len", "--max-model-tokens", help="Most tokens of a request, prompt and answer."),
    ] = None,
    pooling: Annotated[Optional[str], typer.Option(help="How embeddings are pooled: mean or last.")] = None,  # noqa: UP045
    max_loras: Annotated[Optional[int], typer.Option(help="LoRA adapters at once.  [default: 0, none]")] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="Threads a step uses.  [default: cores - 1]")] = None,  # noqa: UP045
    encoder_workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Processes that encode images beside the engine.  [default: 0, the engine does]"),
    ] = None,
    cache_memory: Annotated[Optional[str], typer.Option(help="Bytes for the KV cache, such as 4GiB.")] = None,  # noqa: UP045
    encoder_cache_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Bytes for what images are encoded to, where the model sees.  [default: 256MiB]"),
    ] = None,
    memory_share: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of free memory to use when --cache-memory is not given.  [default: 0.8]"),
    ] = None,
    block_size: Annotated[Optional[int], typer.Option(help="Tokens per cache block.  [default: 16]")] = None,  # noqa: UP045
    prefix_caching: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse computed prefixes.  [default: on]"),
    ] = None,
    speculate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="How to guess tokens ahead: suffix, ngram or draft; answers stay the same.  [default: off]"),
    ] = None,
    speculative_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODEL", help="A smaller model of the same vocabulary to guess with."),
    ] = None,
    speculative_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Most tokens guessed at a time.  [default: 8]"),
    ] = None,
    step_tokens: Annotated[Optional[int], typer.Option(help="Tokens one step may process.  [default: 512]")] = None,  # noqa: UP045
    encoder_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens of images whose features one step may compute.  [default: 512]"),
    ] = None,
    max_running: Annotated[Optional[int], typer.Option(help="Sequences that may run at once.  [default: 256]")] = None,  # noqa: UP045
    max_waiting: Annotated[Optional[int], typer.Option(help="Requests that may queue.  [default: 1024]")] = None,  # noqa: UP045
    log_level: Annotated[Optional[str], typer.Option(help="debug, info, warning or error.")] = None,  # noqa: UP045
    log_format: Annotated[Optional[str], typer.Option(help="auto, console or json.")] = None,  # noqa: UP045
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
            "scheduler.encoder_tokens": ("--encoder-tokens", encoder_tokens),
            "scheduler.max_running": ("--max-running", max_running),
            "scheduler.max_waiting": ("--max-waiting", max_waiting),
            "log.level": ("--log-level", log_level),
            "log.format": ("--log-format", log_format),
        },
    )
    with uncollected():
        from penstock.launch import serve as launch

    raise typer.Exit(launch.serve(loaded.settings, launch.to_stderr))


@app.command()
def chat(
    target: TargetArgument = None,
    model: ServedModelOption = None,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Ask this, print the answer and leave."),
    ] = None,
    system: Annotated[Optional[str], typer.Option(help="System message.")] = None,  # noqa: UP045
    image: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Show this image file with the first question; may be repeated."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 gives the likeliest answer.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk to a model in the terminal."""
    from penstock.cli.chat import run_chat

    run_chat(
        target,
        model=model,
        prompt=prompt,
        system=system,
        temperature=temperature,
        max_tokens=max_tokens,
        images=image or [],
    )


@app.command()
def bench(
    target: TargetArgument = None,
    model: ServedModelOption = None,
    shape: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Run random weights of a published shape, such as qwen2.5-0.5b; short for MODEL shape:NAME."),
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests in one repetition.")] = 64,
    concurrency: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Requests under way at a time.  [default: 32]"),
    ] = None,
    rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.001, help="Requests a second, in a Poisson process, instead of --concurrency."),
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt length: 128, or 32..256.")] = "32..256",
    output_tokens: Annotated[str, typer.Option(help="Answer length: 128, or 32..256.")] = "32..256",
    images: Annotated[
        int, typer.Option(min=0, help="Images with each prompt, for a server whose model sees; prompts are words then.")
    ] = 0,
    image_size: Annotated[str, typer.Option(help="Their width and height.")] = "448x448",
    repetitions: Annotated[int, typer.Option(min=1, help="How often to repeat it.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the first, not counted.")] = 8,
    slo: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What a good answer keeps to, such as ttft=1s,itl=100ms."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides lengths, prompts and arrivals.")] = 0,
    dtype: Annotated[Optional[str], typer.Option(help="As serve has it, for a model run here.")] = None,  # noqa: UP045
    quantize: Annotated[Optional[str], typer.Option(help="As serve has it, for a model run here.")] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="Threads a step uses, for a model run here.")] = None,  # noqa: UP045
    kv_dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="As serve has it, for a model run here."),
    ] = None,
    speculate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="As serve has it, for a model run here.  [default: off, since prompts are random tokens]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Write plots to this PNG.")] = None,  # noqa: UP045
    profile: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Show where steps go, for a model run here; write them to this JSON for Perfetto."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Measure throughput and latency of a model or a server, greedily and with the end of sequence ignored.

    A model run here is set up by the settings file and the environment as serve would, for requests as long as these.
    """
    from penstock.cli.bench import BenchOptions, run_bench

    if shape is not None:
        if target is not None:
            raise typer.BadParameter(f"--shape and {target} exclude each other; give one")
        target = f"shape:{shape}"
    flags = {
        "runner.dtype": ("--dtype", dtype),
        "runner.quantize": ("--quantize", quantize),
        "runner.threads": ("--threads", threads),
        "runner.kv_dtype": ("--kv-dtype", kv_dtype),
    }
    local = [*flags.values(), ("--speculate", speculate), ("--profile", profile)]
    measured: Any = target
    if target is None or not target.startswith(("http://", "https://")):
        if images:
            raise typer.BadParameter("--images is for a server; serve the model and give its URL")
        speculation = ("--speculate", speculate or "off")
        measured = load_found(config, {"model.name": ("MODEL", target), "speculation.method": speculation, **flags})
    elif in_vain := [name for name, value in local if value is not None]:
        raise typer.BadParameter(f"{', '.join(in_vain)} is for a model run here, and {target} is a server")
    options = BenchOptions(
        target=measured,
        model=model,
        num_requests=num_requests,
        concurrency=concurrency,
        rate_per_s=rate,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        num_images=images,
        image_size=image_size,
        repetitions=repetitions,
        num_warmup=warmup,
        slo=slo,
        seed=seed,
        as_json=as_json,
        plot=plot,
        profile=profile,
    )
    raise typer.Exit(run_bench(options))


@app.command("eval")
def evaluate(
    model: ModelArgument = None,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODEL", help="Compare with this reference and give a verdict; may be the same model."),
    ] = None,
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="source, docstrings, recall, signatures, drawings, a task's YAML file or a text file; may be "
            "repeated.  [default: the first four]"
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a text read at once.")] = 2048,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Items of each task, from its beginning; of a text, windows.  [default: all]"),
    ] = None,
    dtype: Annotated[Optional[str], typer.Option(help="As serve has it.")] = None,  # noqa: UP045
    quantize: Annotated[Optional[str], typer.Option(help="As serve has it.")] = None,  # noqa: UP045
    kv_dtype: Annotated[Optional[str], typer.Option(help="As serve has it.")] = None,  # noqa: UP045
    against_dtype: Annotated[Optional[str], typer.Option(help="The same for the reference.")] = None,  # noqa: UP045
    against_quantize: Annotated[Optional[str], typer.Option(help="The same for the reference.")] = None,  # noqa: UP045
    against_kv_dtype: Annotated[Optional[str], typer.Option(help="The same for the reference.")] = None,  # noqa: UP045
    within: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What the verdict asks: any of loss=1%,score=2%,kl=0.05,agreement=95%,speed=1.2.  [default: loss=1%]"
        ),
    ] = None,
    decode_settings: Annotated[
        bool,
        typer.Option(
            "--decode-settings", help="Measure instead what an int8 cache and the reuse of prefixes change in MODEL."
        ),
    ] = False,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure tokens/s and first-token latency.")] = True,
    threads: Annotated[Optional[int], typer.Option(help="Threads a step uses.  [default: cores - 1]")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(min=0, help="Decides what the bootstrap draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write report.json, report.html with plots and a model card to this directory."),
    ] = None,
    beside: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="An earlier report.json, whose models the plots of --out show as well; may be repeated."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Measure how well a model does, offline, and whether it is near enough to another.

    Ends with status 3 if a comparison's verdict fails. Settings come from the settings file and the environment as for
    serve; flags without --against are the candidate's alone.
    """
    from penstock.cli.eval import EvalOptions, run_eval

    def settings(name: str | None, flags: dict[str, tuple[str, Any]]) -> Any:
        return load_found(config, {"model.name": ("MODEL", name), "runner.threads": ("--threads", threads), **flags})

    of_reference = {
        "runner.dtype": ("--against-dtype", against_dtype),
        "runner.quantize": ("--against-quantize", against_quantize),
        "runner.kv_dtype": ("--against-kv-dtype", against_kv_dtype),
    }
    if against is None and (in_vain := [name for name, value in of_reference.values() if value is not None]):
        raise typer.BadParameter(f"{', '.join(in_vain)} is for a reference; name it with --against")
    of_candidate = {
        "runner.dtype": ("--dtype", dtype),
        "runner.quantize": ("--quantize", quantize),
        "runner.kv_dtype": ("--kv-dtype", kv_dtype),
    }
    options = EvalOptions(
        candidate=settings(model, of_candidate),
        reference=None if against is None else settings(against, of_reference),
        tasks=task or [],
        window=window,
        limit=limit,
        within=within,
        has_speed=speed,
        decode_settings=decode_settings,
        seed=seed,
        as_json=as_json,
        out=out,
        beside=beside or [],
    )
    raise typer.Exit(run_eval(options))


@app.command()
def compress(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory, a hub id, or penstock-mini: bf16, fp16 or fp32.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make; must not exist.")],
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="int8, w4a16-gptq, w4a16-awq, w8a8-smooth, or a YAML file.  [default: w4a16-gptq]"),
    ] = None,
    target_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Find the recipe that loses least at this size, such as 1.2GB, instead of --recipe."),
    ] = None,
    max_loss: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Find the smallest model whose perplexity rises no more, such as 1%, instead of --recipe."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="compressed-tensors, gptq, gptq_v2 or awq: how the codes are packed.")
    ] = "compressed-tensors",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="JSONL with a text or messages in each line.  [default: Python's standard library]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    sample_tokens: Annotated[int, typer.Option(min=16, help="Most tokens of a sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Decides which texts are taken.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Take calibration texts that would be refused.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work instead of going on.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout, tables to stderr.")] = False,
) -> None:
    """Make a smaller model, layer by layer; interrupted, the same command goes on at its last layer."""
    from penstock.cli.compress import read_goal, run_compress
    from penstock.compress.calibration.texts import CalibrationOptions
    from penstock.compress.recipe import read_recipe
    from penstock.compress.run import CompressOptions
    from penstock.models import resolve_model

    goal = read_goal(recipe, target_size, max_loss)
    options = CompressOptions(
        model=resolve_model(model, revision),
        out=out.expanduser(),
        recipe=read_recipe(recipe or "w4a16-gptq"),
        layout=layout,
        calibration=CalibrationOptions(
            path=calibration, num_samples=samples, length=sample_tokens, seed=seed, force=force
        ),
        restart=restart,
    )
    raise typer.Exit(run_compress(options, goal, dry_run=dry_run, as_json=as_json))


@app.command()
def distill(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="The model that learns, such as the teacher with layers removed.")
    ],
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="The model it learns from, of the same vocabulary.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make; must not exist.")],
    texts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="JSONL with a text or messages in each line.  [default: Python's standard library]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to learn from and judge by.")] = 4096,
    sample_tokens: Annotated[int, typer.Option(min=16, help="Most tokens of a sequence.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 8,
    rate: Annotated[float, typer.Option(min=0.0, help="Greatest learning rate.")] = 5e-4,
    temperature: Annotated[float, typer.Option(min=0.01, help="More: unlikely tokens count more.")] = 1.0,
    hidden_weight: Annotated[float, typer.Option(min=0.0, help="Of matching hidden states; 0: they are not.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides which texts are taken, and when.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work instead of going on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout, text to stderr.")] = False,
) -> None:
    """Train a smaller model to say what a larger one says; interrupted, the same command goes on."""
    from penstock.cli.distill import run_distill
    from penstock.compress.calibration.texts import CalibrationOptions
    from penstock.compress.distillation import DistillOptions
    from penstock.models import resolve_model

    options = DistillOptions(
        student=resolve_model(student, None),
        teacher=resolve_model(teacher, None),
        out=out.expanduser(),
        texts=CalibrationOptions(path=texts, num_samples=samples, length=sample_tokens, seed=seed),
        steps=steps,
        batch=batch,
        rate=rate,
        temperature=temperature,
        hidden_weight=hidden_weight,
        seed=seed,
        restart=restart,
    )
    raise typer.Exit(run_distill(options, as_json=as_json))


@config_app.command("show")
def config_show(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    config: ConfigOption = None,
) -> None:
    """Print every setting, its value and where it came from."""
    import json

    loaded = load(config, {})
    if as_json:
        rows = [{"key": row.key, "value": row.value, "origin": row.origin} for row in loaded.values]
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row.key) for row in loaded.values)
    # As the settings file would have it: JSON's scalars and lists are TOML's.
    values = ["unset" if row.value is None else json.dumps(row.value) for row in loaded.values]
    value_width = max(map(len, values))
    for row, value in zip(loaded.values, values, strict=True):
        typer.echo(f"{row.key:<{width}}  {value:<{value_width}}  {row.origin}")


def main() -> None:
    """Run the command line; what the user can fix is one line and status 1."""
    try:
        app()
    except PenstockError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(1)
