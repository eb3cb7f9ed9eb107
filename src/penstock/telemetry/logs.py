"""Logs: one event a line, a constant name plus fields. Prompts and keys are never among them."""

import logging
import sys
import threading
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from penstock.errors import InvalidSetting

if TYPE_CHECKING:
    import structlog

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "console", "json")

_LOCK = threading.Lock()
_unconfigured: "list[partial[None]]" = []
"""What is to be done before the next event"""


def get_logger(name: str) -> "structlog.typing.FilteringBoundLogger":
    """Return structlog's logger ``name``."""
    return cast("structlog.typing.FilteringBoundLogger", _LateLogger(name))


def configure_logging(level: str = "info", log_format: str = "auto", *, is_late: bool = False) -> None:
    """Send events of ``level`` and above to standard error; ``auto`` is JSON unless a person is reading.

    ``is_late``, structlog is imported with the first event, for a process that rarely has one: it brings asyncio.
    Raises ``InvalidSetting`` for a level or format there is not.
    """
    for key, value, known in (("log.level", level, LEVELS), ("log.format", log_format, FORMATS)):
        if value not in known:
            raise InvalidSetting(f"{key} is {value!r}; it can be {', '.join(known)}", param=key)
    as_console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    _unconfigured[:] = [partial(_configure, getattr(logging, level.upper()), as_console=as_console)]
    if not is_late:
        _structlog()


class _LateLogger:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        return getattr(_structlog().get_logger(self._name), method)


def _structlog() -> ModuleType:
    with _LOCK:
        # structlog imports rich if it is there, to draw tracebacks for a person, which takes longer than all the rest.
        sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
        import structlog

        if sys.modules["rich"] is None:
            del sys.modules["rich"]
        while _unconfigured:
            _unconfigured.pop()()
    return structlog


def _configure(level: int, *, as_console: bool) -> None:
    import structlog

    renderer = structlog.dev.ConsoleRenderer() if as_console else structlog.processors.JSONRenderer()
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not as_console:
        processors.append(structlog.processors.dict_tracebacks)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
