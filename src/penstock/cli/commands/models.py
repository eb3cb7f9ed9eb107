"""`penstock models`: the registry's commands. What they work with is imported when they run."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from penstock.cli.command import Command
from penstock.cli.options import ConfigOption, JSONOption
from penstock.cli.settings import load
from penstock.units import counted, format_bytes

if TYPE_CHECKING:
    from penstock.registry.config import RegistryConfig
    from penstock.registry.store import RegisteredModel, Registry

models_app = typer.Typer(
    help="Register models: versions, stages, hashes and signatures.", no_args_is_help=True, rich_markup_mode=None
)
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME[:VERSION]", help="NAME alone is its version in production, else the highest that is not retired."
    ),
]
RegistryOption = Annotated[
    str | None,
    typer.Option("--registry", metavar="URL", help="Database, by SQLAlchemy URL.  [default: the setting registry.url]"),
]
MetricsOption = Annotated[Path | None, typer.Option(help="JSON that penstock eval --json printed, or numbers by name.")]


@models_app.command(cls=Command)
def keygen(path: Annotated[Path, typer.Argument(metavar="PATH", help="File of the private key to make.")]) -> None:
    """Make a key to sign models by.

    The public key goes to PATH.pub. Nothing is overwritten.
    """
    _require_registry()
    from penstock.registry.keys import make_keys

    public_path, key_id = make_keys(path.expanduser())
    typer.echo(f"{path}: private key {key_id}; keep it where models are made, and only there")
    typer.echo(f"{public_path}: public key; set registry.public_key to it where models are served")


@models_app.command(cls=Command)
def add(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The model: a directory in Hugging Face layout, or a GGUF file.")
    ],
    name: Annotated[str, typer.Option(help="What to register it as.")],
    version: Annotated[int | None, typer.Option(min=1, help="Its number.  [default: the next]")] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="NAME:VERSION", help="The registered model that it was made from.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="How it was made; kept as text.  [default: as penstock compress left it in DIR]")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="File it was trained, tuned or calibrated with; its hash is kept; may be repeated."
        ),
    ] = None,
    metrics: MetricsOption = None,
    key: Annotated[Path | None, typer.Option(help="Private key to sign it by.")] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Register a model's files, by their hashes, as a candidate.

    The files stay where they are.
    """
    opened, _ = _open(registry, config)
    from penstock.registry.keys import read_private_key
    from penstock.registry.provenance import read_metrics, read_recipe

    model = opened.add(
        directory.expanduser(),
        name=name,
        version=version,
        parent=parent,
        recipe=read_recipe(recipe, directory.expanduser()),
        data=data or [],
        metrics=None if metrics is None else read_metrics(metrics),
        key=None if key is None else read_private_key(key.expanduser()),
    )
    files = counted(len(model.manifest.files), "file")
    typer.echo(f"{model.reference}: {files}, {format_bytes(model.manifest.num_bytes)}, {_signed(model)}")


@models_app.command(cls=Command)
def track(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The model: a directory in Hugging Face layout.")],
    experiment: Annotated[str, typer.Option(help="MLflow's experiment; made if it is not there.")] = "penstock",
    name: Annotated[str | None, typer.Option(help="Of the run.  [default: the directory's]")] = None,
    metrics: MetricsOption = None,
    mlflow: Annotated[
        str | None, typer.Option(metavar="URL", help="MLflow's server.  [default: MLFLOW_TRACKING_URI]")
    ] = None,
    as_json: JSONOption = False,
) -> None:
    """Send a model's recipe, figures and card to an MLflow server.

    Its weights stay where they are.
    """
    from penstock.registry.mlflow_tracking import track as send

    directory = directory.expanduser()
    run = send(
        directory, name=name or directory.resolve().name, experiment=experiment, tracking_uri=mlflow, report=metrics
    )
    if as_json:
        _print_json(asdict(run))
    else:
        typer.echo(f"{directory}: run {run.run_id} of experiment {run.experiment} at {run.tracking_uri}")


@models_app.command("list", cls=Command)
def list_models(as_json: JSONOption = False, registry: RegistryOption = None, config: ConfigOption = None) -> None:
    """List every version of every model."""
    opened, _ = _open(registry, config)
    models = opened.models()
    if as_json:
        _print_json([_plain(model) for model in models])
        return
    if not models:
        typer.echo(f"no model is registered in {opened.shown_url}; penstock models add registers one", err=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", box=None, pad_edge=False)
    for column in ("stage", "size", "registered", "parent", "signed by"):
        table.add_column(column, no_wrap=True)
    for model in models:
        size, when = format_bytes(model.manifest.num_bytes), _when(model)
        table.add_row(model.reference, model.stage, size, when, model.manifest.parent, _signer(model))
    Console().print(table)


@models_app.command(cls=Command)
def show(
    reference: ReferenceArgument,
    as_json: JSONOption = False,
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Show all that is known of a version.

    Where it is, its files, where it comes from and how well it does.
    """
    opened, _ = _open(registry, config)
    from penstock.registry.provenance import figures

    model = opened.find(reference)
    if as_json:
        _print_json(_plain(model))
        return
    manifest = model.manifest
    lines = [
        ("model", model.reference),
        ("stage", model.stage),
        ("files in", str(model.path)),
        ("registered", _when(model)),
        ("signature", _signed(model)),
        ("parent", manifest.parent or "none"),
        *(("data", f"{file.sha256}  {format_bytes(file.size_bytes):>10}  {file.path}") for file in manifest.data),
        *((("metric", f"{name} {value:.6g}") for name, value in figures(model.metrics or {}).items())),
        *(("file", f"{file.sha256}  {format_bytes(file.size_bytes):>10}  {file.path}") for file in manifest.files),
    ]
    for label, value in lines:
        typer.echo(f"{label:<12}{value}")
    if manifest.recipe is not None:
        typer.echo(f"recipe\n{manifest.recipe.rstrip()}")


@models_app.command(cls=Command)
def stage(
    reference: ReferenceArgument,
    to: Annotated[
        Literal["candidate", "production", "retired"],
        typer.Argument(metavar="STAGE", help="What it is for now."),
    ],
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Say what a version is for.

    One version of a name is in production: the former one is retired in the same step.
    """
    opened, _ = _open(registry, config)
    model, former = opened.set_stage(reference, to)
    typer.echo(f"{model.reference}: {model.stage}")
    for version in former:
        typer.echo(f"{model.manifest.name}:{version}: retired")


@models_app.command(cls=Command)
def verify(
    reference: ReferenceArgument,
    public_key: Annotated[
        str | None, typer.Option(help="Key by which it has to be signed.  [default: the setting registry.public_key]")
    ] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
) -> None:
    """Read a version's files and compare them with the record.

    Says by whom they were signed. Ends with status 1 if anything is not what was registered.
    """
    opened, settings = _open(registry, config, public_key=public_key)
    from penstock.registry.verify import verify as verify_model

    key = None if settings.public_key is None else Path(settings.public_key).expanduser()
    typer.echo(verify_model(opened.find(reference), key).describe())


def _require_registry() -> None:
    from penstock.registry import require_registry

    require_registry()


def _open(
    url: str | None, config: Path | None, *, public_key: str | None = None
) -> tuple["Registry", "RegistryConfig"]:
    """Return the registry that flags, the environment and the settings file choose, and its settings."""
    _require_registry()
    from penstock.registry.store import Registry

    flags = {"registry.url": ("--registry", url), "registry.public_key": ("--public-key", public_key)}
    settings = load(config, flags).settings.registry
    return Registry(settings.url), settings


def _signer(model: "RegisteredModel") -> str | None:
    from penstock.registry.keys import key_id

    return None if model.public_key is None else key_id(model.public_key)


def _signed(model: "RegisteredModel") -> str:
    signer = _signer(model)
    return "not signed" if signer is None else f"signed by {signer}"


def _when(model: "RegisteredModel") -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(model.registered_at_s))


def _plain(model: "RegisteredModel") -> dict[str, Any]:
    """Return what a program may want to know."""
    return {
        **json.loads(model.manifest_text),
        "stage": model.stage,
        "path": str(model.path),
        "metrics": model.metrics,
        "public_key": None if model.public_key is None else model.public_key.hex(),
        "signature": None if model.signature is None else model.signature.hex(),
        "registered_at_s": model.registered_at_s,
    }


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
