"""All settings there are, each declared beside the component it belongs to."""

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from penstock.engine.config import CacheConfig, RunnerConfig, SchedulerConfig, SpeculationConfig
from penstock.images.config import ImageConfig
from penstock.registry.config import RegistryConfig
from penstock.server.config import ServerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which model to run."""

    name: Annotated[str, msgspec.Meta(min_length=1)] = "penstock-mini"
    """A directory in Hugging Face layout, a GGUF file, a hub id, penstock-mini, which ships with the package, or the
    shape of a published model with random weights, such as shape:qwen2.5-0.5b. serve, bench and eval also take
    registry:NAME, registry:NAME:VERSION and registry:NAME@production, and verify that model first."""
    revision: str | None = None
    """A branch, tag or commit of a hub id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSettings:
    """What is logged and how."""

    level: str = "info"
    """debug, info, warning or error."""
    format: str = "auto"
    """json, console, or auto: JSON unless a person is reading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything an operator can set."""

    model: ModelSettings = field(default_factory=ModelSettings)
    server: ServerConfig = field(default_factory=ServerConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    log: LogSettings = field(default_factory=LogSettings)
