"""Which process uses how many cores. This imports little."""

from penstock.estimate.system import core_cpus, usable_cores
from penstock.launch.settings import Settings


def share_threads(settings: Settings) -> tuple[int, int]:
    """Return how many threads the engine's steps use, and each encoder process.

    All cores but one, which the API's process needs, each for one thread: two that share one stall the others.
    """
    num_workers, num_cores = settings.runner.encoder_workers, max(1, usable_cores() - 1)
    if settings.runner.threads is not None:
        num_left = num_cores - settings.runner.threads
        return settings.runner.threads, max(1, num_left // num_workers) if num_workers else 0
    each = max(1, num_cores // (num_workers + 1))
    return max(1, num_cores - num_workers * each), each


def tied_cpus(settings: Settings, num_threads: int) -> list[int]:
    """Return the processors that the engine's threads besides the first stay on; none if they may go anywhere.

    The first is Python's too and goes where there is room.
    """
    return core_cpus()[1:num_threads] if settings.runner.pin_threads else []
