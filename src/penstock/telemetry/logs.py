"""Logs: one event a line, a constant name plus fields. Prompts and keys are never among them."""

import logging
import sys

# structlog imports rich if it is there, to draw tracebacks for a person, which takes longer than all the rest of it.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
import structlog  # noqa: E402

if sys.modules["rich"] is None:
    del sys.modules["rich"]

from penstock.errors import InvalidSetting  # noqa: E402

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "console", "json")


def configure_logging(level: str = "info", log_format: str = "auto") -> None:
    """Send events of ``level`` and above to standard error; ``auto`` is JSON unless a person is reading.

    Raises ``InvalidSetting`` for a level or format there is not.
    """
    for key, value, known in (("log.level", level, LEVELS), ("log.format", log_format, FORMATS)):
        if value not in known:
            raise InvalidSetting(f"{key} is {value!r}; it can be {', '.join(known)}", param=key)
    as_console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderer = structlog.dev.ConsoleRenderer() if as_console else structlog.processors.JSONRenderer()
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not as_console:
        processors.append(structlog.processors.dict_tracebacks)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
