"""From what a person names to a task."""

from collections.abc import Sequence
from pathlib import Path

from penstock.errors import InvalidSetting
from penstock.eval.files import read_text
from penstock.eval.own_task import read_own_task
from penstock.eval.sets import BUILT_IN, OF_TEXT, built_in_task
from penstock.eval.tasks import PerplexityTask, Task


def load_tasks(names: Sequence[str], *, window: int) -> list[Task]:
    """Return a task for each name: a built-in one, a YAML file (see ``own_task``) or a text. For none: those of text.

    ``window`` is how many tokens of a text are read at once. Raises ``InvalidSetting``.
    """
    tasks = [_load(name, window) for name in names or OF_TEXT]
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise InvalidSetting(f"two tasks are called {task.name!r}; rename one of them")
    return tasks


def _load(name: str, window: int) -> Task:
    if name in BUILT_IN:
        return built_in_task(name, window=window)
    path = Path(name).expanduser()
    if not path.is_file():
        raise InvalidSetting(
            f"there is no task {name!r}: give {', '.join(BUILT_IN)}, a task's YAML file or a text file"
        )
    if path.suffix in (".yaml", ".yml"):
        return read_own_task(path, window=window)
    return PerplexityTask(path.name, read_text(path), window=window)
