"""Options and arguments that more than one command takes."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A directory, a GGUF file, a hub id, registry:NAME, or penstock-mini (the default)."
    ),
]
TargetArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL|URL", help="A model to run here (default: penstock-mini), or a server's URL."),
]
ServedModelOption = Annotated[
    str | None, typer.Option("--model", help="Which of the server's models, with a URL.  [default: its first]")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]

DtypeOption = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
QuantizeOption = Annotated[str | None, typer.Option(help="int8, int4, w8a16 or w4a16: quantize while loading.")]
KVDtypeOption = Annotated[
    str | None,
    typer.Option(help="What keys and values are cached in: auto (the weights' dtype), float32, bf16 or int8."),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads a step uses at most.  [default: all cores]")]

ConfigOption = Annotated[
    Path | None, typer.Option(help="Settings file (TOML); else PENSTOCK_CONFIG, else ./penstock.toml.")
]
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

NewModelOption = Annotated[Path, typer.Option("--out", "-o", help="Directory to make; must not exist.")]
TextsOption = Annotated[
    Path | None, typer.Option(help="JSONL with a text or messages in each line.  [default: Python's standard library]")
]
SampleTokensOption = Annotated[int, typer.Option(min=16, help="Most tokens of a sequence.")]
RestartOption = Annotated[bool, typer.Option("--restart", help="Discard unfinished work instead of going on.")]
JSONBesideTextOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, text to stderr.")]
