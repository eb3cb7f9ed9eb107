"""`penstock distill`."""

from typing import Annotated

import typer

from penstock.cli.options import JSONBesideTextOption, NewModelOption, RestartOption, SampleTokensOption, TextsOption


def distill(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="The model that learns, such as the teacher with layers removed.")
    ],
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="The model it learns from, of the same vocabulary.")],
    out: NewModelOption,
    texts: TextsOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to learn from and judge by.")] = 4096,
    sample_tokens: SampleTokensOption = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 8,
    rate: Annotated[float, typer.Option(min=0.0, help="Greatest learning rate.")] = 5e-4,
    temperature: Annotated[float, typer.Option(min=0.01, help="More: unlikely tokens count more.")] = 1.0,
    hidden_weight: Annotated[float, typer.Option(min=0.0, help="Of matching hidden states; 0: they are not.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides which texts are taken, and when.")] = 0,
    restart: RestartOption = False,
    as_json: JSONBesideTextOption = False,
) -> None:
    """Train a smaller model to say what a larger one says.

    After an interruption the same command goes on where it was.
    """
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
