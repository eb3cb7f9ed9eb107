"""Settings as commands get them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from penstock.config import Loaded
    from penstock.launch.settings import Settings

Flags = dict[str, tuple[str, Any]]
"""From a setting's key to (flag, value), None meaning not given"""


def load(config: Path | None, flags: Flags) -> "Loaded[Settings]":
    """Return the merged settings."""
    import os

    from penstock.config import Flag, find_config_file, load_settings
    from penstock.launch.settings import Settings

    given = {key: Flag(name=name, value=value) for key, (name, value) in flags.items() if value is not None}
    file = find_config_file(config, os.environ, Path.cwd())
    return load_settings(Settings, file=file, environ=os.environ, flags=given)


def load_found(config: Path | None, flags: Flags) -> "Settings":
    """Return the merged settings, a registered model in them being verified and found."""
    from penstock.launch.registered import find_registered

    return find_registered(load(config, flags).settings, lambda line: typer.echo(line, err=True))


def runner_flags(dtype: str | None, quantize: str | None, kv_dtype: str | None, *, prefix: str = "--") -> Flags:
    """Return how a model is held, as the flags say that begin with ``prefix``."""
    return {
        "runner.dtype": (f"{prefix}dtype", dtype),
        "runner.quantize": (f"{prefix}quantize", quantize),
        "runner.kv_dtype": (f"{prefix}kv-dtype", kv_dtype),
    }
