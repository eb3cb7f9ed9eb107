"""`penstock config`."""

import json

import typer

from penstock.cli.options import ConfigOption, JSONOption
from penstock.cli.settings import load

config_app = typer.Typer(help="Look at settings.", no_args_is_help=True, rich_markup_mode=None)


@config_app.command()
def show(
    as_json: JSONOption = False,
    config: ConfigOption = None,
) -> None:
    """Print every setting, its value and where it came from."""
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
