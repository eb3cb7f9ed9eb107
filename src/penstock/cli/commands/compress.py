"""`penstock compress`."""

from typing import Annotated

import typer

from penstock.cli.options import (
    JSONBesideTextOption,
    NewModelOption,
    RestartOption,
    RevisionOption,
    SampleTokensOption,
    TextsOption,
)


def compress(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory, a hub id, or penstock-mini: bf16, fp16 or fp32.")
    ],
    out: NewModelOption,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="int8, w4a16-gptq, w4a16-awq, w8a8-smooth, vlm-mixed, or a YAML file.  [default: w4a16-gptq]"
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(help="Find the recipe that loses least at this size, such as 1.2GB, instead of --recipe."),
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(help="Find the smallest model whose perplexity rises no more, such as 1%, instead of --recipe."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="compressed-tensors, gptq, gptq_v2 or awq: how the codes are packed.")
    ] = "compressed-tensors",
    calibration: TextsOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    sample_tokens: SampleTokensOption = 512,
    seed: Annotated[int, typer.Option(help="Decides which texts are taken.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Take calibration texts that would be refused.")] = False,
    restart: RestartOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")] = False,
    revision: RevisionOption = None,
    as_json: JSONBesideTextOption = False,
) -> None:
    """Make a smaller model, layer by layer.

    After an interruption the same command goes on at its last layer.
    """
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
