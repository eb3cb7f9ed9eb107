"""`penstock chat`."""

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.options import ServedModelOption, TargetArgument


def chat(
    target: TargetArgument = None,
    model: ServedModelOption = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Show this image file with the first question; may be repeated."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 gives the likeliest answer.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk to a model in the terminal.

    A model run here is set up by the settings file and the environment as serve would; a server's key is
    OPENAI_API_KEY.
    """
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
