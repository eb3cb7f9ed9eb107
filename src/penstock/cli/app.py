"""`penstock`: every command, with its work imported only when it runs, so that help is instant."""

from typing import Annotated

import typer

from penstock import __version__
from penstock.cli.command import Command
from penstock.cli.commands.bench import bench
from penstock.cli.commands.chat import chat
from penstock.cli.commands.compress import compress
from penstock.cli.commands.config import config_app
from penstock.cli.commands.distill import distill
from penstock.cli.commands.evaluate import evaluate
from penstock.cli.commands.models import models_app
from penstock.cli.commands.serve import serve

app = typer.Typer(
    name="penstock",
    help="Serve language models on ordinary machines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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


app.command(cls=Command)(serve)
app.command(cls=Command)(chat)
app.command(cls=Command)(bench)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(compress)
app.command(cls=Command)(distill)
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")
