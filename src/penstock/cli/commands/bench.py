"""`penstock bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.options import (
    ConfigOption,
    DtypeOption,
    JSONOption,
    KVDtypeOption,
    QuantizeOption,
    ServedModelOption,
    TargetArgument,
    ThreadsOption,
)
from penstock.cli.settings import load_found, runner_flags

if TYPE_CHECKING:
    from penstock.launch.settings import Settings


def bench(
    target: TargetArgument = None,
    model: ServedModelOption = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Run random weights of a published shape, such as qwen2.5-0.5b; short for MODEL shape:NAME."),
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests in one repetition.")] = 64,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests under way at a time.  [default: 32]")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests a second, in a Poisson process, instead of --concurrency.")
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt length: 128, or 32..256.")] = "32..256",
    output_tokens: Annotated[str, typer.Option(help="Answer length: 128, or 32..256.")] = "32..256",
    images: Annotated[
        int, typer.Option(min=0, help="Images with each prompt, for a server whose model sees; prompts are words then.")
    ] = 0,
    image_size: Annotated[str, typer.Option(help="Their width and height.")] = "448x448",
    repetitions: Annotated[int, typer.Option(min=1, help="How often to repeat it.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the first, not counted.")] = 8,
    slo: Annotated[str | None, typer.Option(help="What a good answer keeps to, such as ttft=1s,itl=100ms.")] = None,
    seed: Annotated[int, typer.Option(help="Decides lengths, prompts and arrivals.")] = 0,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    threads: ThreadsOption = None,
    kv_dtype: KVDtypeOption = None,
    speculate: Annotated[
        str | None, typer.Option(help="As serve has it.  [default: off, since prompts are random tokens]")
    ] = None,
    as_json: JSONOption = False,
    plot: Annotated[Path | None, typer.Option(help="Write plots to this PNG.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Show where steps go; write them to this JSON for Perfetto."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Measure throughput and latency of a model or a server.

    Answers are greedy, and go on where a model would end them. A model run here is set up by the settings file and the
    environment as serve would, for requests as long as these; --dtype, --quantize, --threads, --kv-dtype, --speculate
    and --profile are for such a model alone.
    """
    from penstock.cli.bench import BenchOptions, run_bench

    if shape is not None:
        if target is not None:
            raise typer.BadParameter(f"--shape and {target} exclude each other; give one")
        target = f"shape:{shape}"
    flags = {"runner.threads": ("--threads", threads), **runner_flags(dtype, quantize, kv_dtype)}
    local = [*flags.values(), ("--speculate", speculate), ("--profile", profile)]
    measured: str | Settings
    if target is not None and target.startswith(("http://", "https://")):
        if in_vain := [name for name, value in local if value is not None]:
            raise typer.BadParameter(f"{', '.join(in_vain)} is for a model run here, and {target} is a server")
        measured = target
    else:
        if images:
            raise typer.BadParameter("--images is for a server; serve the model and give its URL")
        speculation = ("--speculate", speculate or "off")
        measured = load_found(config, {"model.name": ("MODEL", target), "speculation.method": speculation, **flags})
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
