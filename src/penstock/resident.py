"""What starting leaves in memory and serving does not need."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4


def give_back() -> None:
    """Return to the system what was freed, and the code that ran once; does nothing where there is no glibc.

    Importing torch runs 70 MB of libraries, in which its ops are registered, and malloc holds on to what loading freed.
    Code is mapped from its file: what is run again comes from the page cache, in microseconds.
    """
    if not return_freed():
        return
    libc = ctypes.CDLL(None)
    for begin, end in _unchanged_code():
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def return_freed() -> bool:
    """Return to the system what was freed; False, and nothing done, without glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return False
    libc.malloc_trim(0)
    return True


def _unchanged_code() -> Iterator[tuple[int, int]]:
    """Yield where code of files lies, if every page of it is the file's own: what was written to would be lost."""
    code: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):  # a mapping's first line: addresses, permissions, offset, device, inode, path
            begin, end = (int(address, 16) for address in key.split("-"))
            code = (begin, end) if values[0] == "r-xp" and values[3] != "0" else None
        elif key == "Anonymous:" and code is not None and values[0] == "0":
            yield code
