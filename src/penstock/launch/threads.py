"""Which process uses how many cores. This imports little."""

from typing import NamedTuple

from penstock.estimate.system import core_cpus, usable_cores
from penstock.launch.settings import Settings


class Threads(NamedTuple):
    """How many run at once."""

    few_rows: int
    """Of the engine, in steps over few tokens"""
    many_rows: int
    """Of the engine, in others"""
    encoder: int
    """Of each encoder process; 0 without them"""


def share_threads(settings: Settings) -> Threads:
    """Return what each process gets of the cores, each for one thread: two that share one stall the others.

    The API's process needs one, now and then. Steps over many tokens compute all the while and take it too; in others a
    thread more may wait for memory, and repeated ones find out whether it does.
    """
    usable, num_workers, wanted = usable_cores(), settings.runner.encoder_workers, settings.runner.threads
    num_cores = max(1, usable - 1)
    each = 0
    if num_workers:
        each = max(1, num_cores // (num_workers + 1) if wanted is None else (num_cores - wanted) // num_workers)
    num_left = usable - num_workers * each
    many = max(1, num_left) if wanted is None else wanted
    return Threads(many if many < num_left else max(1, many - 1), many, each)


def tied_cpus(settings: Settings, num_threads: int) -> list[int]:
    """Return the processors that the engine's threads besides the first stay on; none if they may go anywhere.

    The first is Python's too and goes where there is room.
    """
    return core_cpus()[1:num_threads] if settings.runner.pin_threads else []
