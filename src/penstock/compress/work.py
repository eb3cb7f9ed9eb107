"""The directory in which a compressed model comes about: what was finished survives the process.

    OUT.partial/plan.json            what is being made, so that nothing else goes on from it
    OUT.partial/ends.safetensors     what became of embeddings and head
    OUT.partial/hidden-00003.bin     what layer 3 reads
    OUT.partial/layers/00002.safetensors   what layer 2 became; beside it, in JSON, what is reported of it

A layer's file appears, whole, after the next layer's inputs did: it being there means that the layer is done.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from penstock.errors import InvalidSetting, ModelUnreadable, NotEnoughDisk
from penstock.units import format_bytes


class WorkDirectory:
    """Beside the model that comes about; the model itself appears in one step."""

    def __init__(self, out: Path, plan: Mapping[str, Any], *, restart: bool) -> None:
        """Go on with what is there if it follows the same ``plan``; ``restart`` discards it.

        Raises ``InvalidSetting`` if ``out`` exists, or unfinished work of another plan does.
        """
        self.out = out
        self.path = _path(out)
        require_absent(out)
        if restart:
            shutil.rmtree(self.path, ignore_errors=True)
        file = self.path / "plan.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != plan:
            raise InvalidSetting(
                f"{self.path} holds unfinished work on another model, recipe or calibration; go on with that, or "
                "discard it with --restart",
                param="output",
            )
        self.is_resumed = file.is_file()
        self.layers.mkdir(parents=True, exist_ok=True)
        if not self.is_resumed:
            write_whole(file, json.dumps(plan, indent=1).encode())

    @property
    def layers(self) -> Path:
        """Where layers are."""
        return self.path / "layers"

    @property
    def ends(self) -> Path:
        """Where the finished matrices of no layer are."""
        return ends_file(self.out)

    def hidden(self, index: int) -> Path:
        """Where the inputs of layer ``index`` are."""
        return self.path / f"hidden-{index:05}.bin"

    def layer(self, index: int) -> Path:
        """Where a finished layer is."""
        return self.layers / f"{index:05}.safetensors"

    def first_unfinished(self, num_layers: int) -> int:
        """Return the first layer that is not done. Raises ``ModelUnreadable`` if its inputs are gone."""
        index = next((i for i in range(num_layers) if not self.layer(i).is_file()), num_layers)
        if index and not self.hidden(index).is_file():
            raise ModelUnreadable(f"{self.hidden(index)} is gone, so this cannot go on; start anew with --restart")
        return index

    def finish(self, result: Path) -> None:
        """Make directory ``result``, which lies in here, the model, and remove everything else."""
        result.rename(self.out)
        _sync(self.out.parent)
        shutil.rmtree(self.path)


def _path(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def ends_file(out: Path) -> Path:
    """Return where a work directory for ``out`` keeps the finished matrices of no layer."""
    return _path(out) / "ends.safetensors"


def require_absent(out: Path) -> None:
    """Raise ``InvalidSetting`` if ``out`` exists."""
    if out.exists():
        raise InvalidSetting(f"{out} exists; give another directory, or remove it", param="output")


def require_room(path: Path, num_bytes: int) -> None:
    """Raise ``NotEnoughDisk`` if ``num_bytes`` do not fit where ``path`` will be."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise NotEnoughDisk(
            f"compressing takes {format_bytes(num_bytes)} on disk, and {parent} has {format_bytes(free)} left; free "
            "some, or write elsewhere"
        )


def save_finished(file: Path, tensors: Mapping[str, Tensor], report: object) -> None:
    """Keep a finished layer, or the ends, in ``file``, and beside it what is reported of it."""
    write_whole(file.with_suffix(".json"), json.dumps(report).encode())
    save_tensors(file, tensors)


def reported(file: Path) -> Any:
    """Return what was reported of a finished layer, or of the ends."""
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def write_whole(file: Path, content: bytes) -> None:
    """Write ``file`` so that it is there in full or not at all."""
    unfinished(file).write_bytes(content)
    keep(file)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors ``file`` so that it is there in full or not at all."""
    save_file(dict(tensors), unfinished(file), metadata={"format": "pt"})
    keep(file)


def keep(file: Path) -> None:
    """Make what was written as ``unfinished(file)`` the file; it outlasts a loss of power."""
    with unfinished(file).open("rb") as handle:
        os.fsync(handle.fileno())
    unfinished(file).rename(file)
    _sync(file.parent)


def unfinished(file: Path) -> Path:
    """Return where ``file`` is while it is written."""
    return file.with_name(f"{file.name}.unfinished")


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
