"""`penstock eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.options import (
    ConfigOption,
    DtypeOption,
    JSONOption,
    KVDtypeOption,
    ModelArgument,
    QuantizeOption,
    ThreadsOption,
)
from penstock.cli.settings import Flags, load_found, runner_flags

if TYPE_CHECKING:
    from penstock.launch.settings import Settings

_OfReference = Annotated[str | None, typer.Option(help="The same for the reference.")]


def evaluate(
    model: ModelArgument = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with this reference and give a verdict; may be the same model."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="source, docstrings, recall, signatures, drawings, a task's YAML file or a text file; may be "
            "repeated.  [default: the first four]",
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a text read at once.")] = 2048,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Items of each task, from its beginning; of a text, windows.  [default: all]"),
    ] = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    kv_dtype: KVDtypeOption = None,
    against_dtype: _OfReference = None,
    against_quantize: _OfReference = None,
    against_kv_dtype: _OfReference = None,
    within: Annotated[
        str | None,
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
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides what the bootstrap draws.")] = 0,
    as_json: JSONOption = False,
    out: Annotated[
        Path | None, typer.Option(help="Write report.json, report.html with plots and a model card to this directory.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="An earlier report.json, whose models the plots of --out show as well; may be repeated.",
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Measure how well a model does, alone or beside another.

    Ends with status 3 if a comparison's verdict fails. Settings come from the settings file and the environment as for
    serve; flags without --against are the candidate's alone.
    """
    from penstock.cli.eval import EvalOptions, run_eval

    def settings(name: str | None, flags: Flags) -> "Settings":
        return load_found(config, {"model.name": ("MODEL", name), "runner.threads": ("--threads", threads), **flags})

    of_reference = runner_flags(against_dtype, against_quantize, against_kv_dtype, prefix="--against-")
    if against is None and (in_vain := [name for name, value in of_reference.values() if value is not None]):
        raise typer.BadParameter(f"{', '.join(in_vain)} is for a reference; name it with --against")
    options = EvalOptions(
        candidate=settings(model, runner_flags(dtype, quantize, kv_dtype)),
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
