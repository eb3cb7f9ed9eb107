"""Models by their names in the registry, verified before anything of them is read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from penstock.launch.settings import Settings
from penstock.registry import require_registry

_PREFIX = "registry:"


def find_registered(settings: Settings, say: Callable[[str], None]) -> Settings:
    """Return ``settings`` with directories in place of ``registry:NAME``, of the model and of the one that guesses.

    Each has been verified, and ``say`` has printed what vouches for it. The server calls the model by its name in the
    registry unless it was given others. Raises ``MissingExtra``, ``NotRegistered`` or ``NotVerified``.
    """
    name, draft = settings.model.name, settings.speculation.model
    if name.startswith(_PREFIX):
        registered, path = _verified(name, settings, say)
        server = settings.server
        if not server.served_names:
            server = replace(server, served_names=(registered,))
        settings = replace(settings, model=replace(settings.model, name=path), server=server)
    if draft is not None and draft.startswith(_PREFIX):
        _, path = _verified(draft, settings, say)
        settings = replace(settings, speculation=replace(settings.speculation, model=path))
    return settings


def _verified(name: str, settings: Settings, say: Callable[[str], None]) -> tuple[str, str]:
    """Return a model's name in the registry and where it is."""
    require_registry()
    from penstock.registry.store import Registry
    from penstock.registry.verify import verify

    config = settings.registry
    model = Registry(config.url).find(name.removeprefix(_PREFIX))
    found = verify(model, None if config.public_key is None else Path(config.public_key).expanduser())
    say(found.describe())
    return model.manifest.name, str(model.path)
