"""A thread for work that must neither hold anybody up nor be waited for at the end."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_Calls = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
_STACK_SIZE = threading.Lock()
"""The size of new threads' stacks is the process's: two of these must not be started at once."""


class WorkThread:
    """Runs one call after another on a thread of its own, which starts with the first.

    Unlike a ``ThreadPoolExecutor``'s, the thread ends with the process, whatever it is doing, and its stack has the
    size that its work needs. Dropping the object is enough to end it once it has done what it was given.
    """

    def __init__(self, name: str, *, stack_bytes: int = 0) -> None:
        """``stack_bytes`` 0 is the system's default."""
        self._name = name
        self._stack_bytes = stack_bytes
        self._calls: _Calls = queue.SimpleQueue()
        self._is_started = False

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have ``call`` run after what was submitted before it. Submit from one thread only."""
        if not self._is_started:
            self._start()
        future: Future[T] = Future()
        self._calls.put((future, lambda: call(*args, **kwargs)))
        return future

    def _start(self) -> None:
        self._is_started = True
        weakref.finalize(self, self._calls.put, None)
        with _STACK_SIZE:
            ordinary = threading.stack_size(self._stack_bytes)
            try:
                threading.Thread(target=_run, args=(self._calls,), name=self._name, daemon=True).start()
            finally:
                threading.stack_size(ordinary)


def _run(calls: _Calls) -> None:
    while (item := calls.get()) is not None:
        future, call = item
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:  # whoever awaits the result gets it
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del item, future, call  # nothing stays alive for the next call's sake
