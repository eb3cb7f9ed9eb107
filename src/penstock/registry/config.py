"""What an operator may tell the registry."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryConfig:
    """Where models are registered, and whose signature counts."""

    url: str | None = None
    """The database, by SQLAlchemy URL, such as `postgresql+psycopg://host/models`; None: `penstock/registry.db` in
    `$XDG_DATA_HOME`, else in `~/.local/share`. Leave passwords to the database's own files and variables."""
    public_key: str | None = None
    """File of the public key by which a registered model has to be signed to be loaded; None: one that is not signed is
    loaded as well, and a signature has to fit the key that was recorded with it."""
