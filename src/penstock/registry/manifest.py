"""What a version of a model is, in bytes that a signature can cover."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import msgspec

from penstock.errors import ModelUnreadable
from penstock.estimate.system import usable_cores

_NOT_THE_MODEL = (".git", ".cache")
"""Directories at the top of a download that change by themselves and that nothing is loaded from"""


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file as it was."""

    path: str
    """Below the model's directory, with ``/``; of other files, as it was given"""
    size_bytes: int
    sha256: str


class Manifest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="format", tag="penstock-model-1"
):
    """All that a signature covers."""

    name: str
    version: int
    parent: str | None
    """NAME:V of what it was made from"""
    recipe: str | None
    """How it was made: the text of a file"""
    data: tuple[FileRecord, ...]
    """What it was trained, tuned or calibrated with"""
    files: tuple[FileRecord, ...]
    """Every file, by path"""

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    def encode(self) -> str:
        """Return the one text that stands for these values."""
        return msgspec.json.encode(self, order="sorted").decode()


def model_files(path: Path) -> dict[str, Path]:
    """Return every file of a model by its path below the directory ``path``; a GGUF file is the only one of its.

    Links to files count as files. Raises ``ModelUnreadable`` for a directory that is not there, and for what cannot be
    hashed: links to directories, pipes, names that are not UTF-8.
    """
    if path.is_file():
        return {path.name: path}
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(path, onerror=_unreadable):
        here = Path(folder)
        if here == path:
            folders[:] = [name for name in folders if name not in _NOT_THE_MODEL]
        odd = [name for name in folders if (here / name).is_symlink()]
        odd += [name for name in names if not (here / name).is_file()]
        # What is not UTF-8 is not printable either.
        odd += [name for name in (*folders, *names) if not name.isprintable()]
        if odd:
            raise ModelUnreadable(
                f"{here} holds {odd[0]!r}, which is no plain file or directory with a printable name; a registered "
                "model consists of these alone: remove it, or put a copy in its place"
            )
        found |= {(here / name).relative_to(path).as_posix(): here / name for name in names}
    return found


def hash_files(files: Mapping[str, Path]) -> tuple[FileRecord, ...]:
    """Return records of ``files``, sorted by path, hashed side by side on all cores. Raises ``ModelUnreadable``."""
    paths = sorted(files)
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        return tuple(pool.map(_hash, paths, (files[path] for path in paths)))


def _hash(path: str, file: Path) -> FileRecord:
    try:
        with file.open("rb") as opened:
            # A piece at a time, and without the interpreter's lock.
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            return FileRecord(path=path, size_bytes=opened.tell(), sha256=digest)
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    raise ModelUnreadable(
        f"{error.filename} cannot be read: {error.strerror}; check the path and its permissions"
    ) from error
