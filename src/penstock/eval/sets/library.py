"""The standard library as data: which files are read, and which whole modules no model of ours was trained on."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_MODULES = frozenset(
    {
        "colorsys",
        "filecmp",
        "fractions",
        "graphlib",
        "imaplib",
        "mailbox",
        "netrc",
        "optparse",
        "plistlib",
        "quopri",
        "rlcompleter",
        "sched",
        "shelve",
        "trace",
        "wave",
        "wsgiref",
        "xmlrpc",
        "zipapp",
    }
)
"""Top-level modules and packages that neither the model nor its tokenizer ever sees: about 5% of the source."""

SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "encodings",
        "idle_test",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
"""Tests, tables and bundled programs: large, repetitive, or not the library itself."""

SKIPPED_FILES = frozenset({"html/entities.py", "antigravity.py", "this.py", "ctypes/macholib/dyld.py"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: its path below the library's root, and its text."""

    path: str
    text: str

    @property
    def module(self) -> str:
        """The top-level module or package the file belongs to."""
        return top_level(self.path.removesuffix(".py").replace("/", "."))


def top_level(dotted: str) -> str:
    """The first part of a dotted name: 'os' for 'os.path.join'."""
    return dotted.partition(".")[0]


def is_held_out(dotted: str) -> bool:
    """Whether a dotted name lies in a held-out module."""
    return top_level(dotted) in HELD_OUT_MODULES


def library_root() -> Path:
    """Where the running Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_documents(root: Path) -> Iterator[Document]:
    """Every kept source file below `root` in path order, each distinct text once."""
    seen: set[bytes] = set()
    for path in sorted(_source_files(root)):
        name = path.relative_to(root).as_posix()
        if name in SKIPPED_FILES or name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield Document(name, text)


def _source_files(root: Path) -> Iterator[Path]:
    """Every source file in a directory that is not skipped: what was installed may be a hundred times the library."""
    for directory, names, files in os.walk(root):
        names[:] = set(names) - SKIPPED_DIRECTORIES
        yield from (Path(directory, name) for name in files if name.endswith(".py"))


def split_documents(root: Path) -> tuple[list[Document], list[Document]]:
    """The (training, held-out) documents; the split depends on the module's name alone."""
    training: list[Document] = []
    held_out: list[Document] = []
    for document in read_documents(root):
        (held_out if document.module in HELD_OUT_MODULES else training).append(document)
    return training, held_out
