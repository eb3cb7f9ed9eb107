"""Every setting there is, gathered from the components that own them."""

from dataclasses import dataclass, field

from penstock.engine.config import CacheConfig, EngineConfig, RunnerConfig, SchedulerConfig
from penstock.errors import InvalidSetting
from penstock.models.source import DEMO_MODEL
from penstock.server.config import ServerConfig
from penstock.telemetry.logs import FORMATS, LEVELS


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which model runs."""

    name: str = DEMO_MODEL
    """A directory in Hugging Face layout, a hub id, or the demo model."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None takes its default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSettings:
    """What is written to standard error."""

    level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``. ``info`` has one event per request."""
    format: str = "auto"
    """``console``, ``json``, or ``auto``: JSON unless a person is reading."""

    def __post_init__(self) -> None:
        for name, value, known in (("level", self.level, LEVELS), ("format", self.format, FORMATS)):
            if value not in known:
                raise InvalidSetting(f"log.{name} is {value!r}; it can be {', '.join(known)}", param=f"log.{name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All settings of one server."""

    model: ModelSettings = field(default_factory=ModelSettings)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def engine(self) -> EngineConfig:
        """The engine's part."""
        return EngineConfig(scheduler=self.scheduler, cache=self.cache, runner=self.runner)
