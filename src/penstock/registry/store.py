"""The registry's rows, in SQLite or any other database that SQLAlchemy knows.

penstock_registry   one row: the version of these tables
penstock_models     a row for each version of each model
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    Text,
    create_engine,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

from penstock.errors import InvalidSetting, MissingExtra, ModelUnreadable, NotRegistered, NotVerified
from penstock.registry.manifest import FileRecord, Manifest, hash_files, model_files
from penstock.registry.names import parse_reference, require_name

Stage = Literal["candidate", "production", "retired"]
SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 30
"""How long SQLite waits for another writer, whose transaction takes milliseconds"""
_MAX_ATTEMPTS = 100
"""At a version's number: for each that fails, another process has registered one"""

RESTORE_RECORD = "somebody changed the registry: restore it from a backup, or register the files as a new version"

_metadata = MetaData()
_registry = Table("penstock_registry", _metadata, Column("schema_version", Integer, primary_key=True))
_models = Table(
    "penstock_models",
    _metadata,
    Column("name", String(100), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("stage", String(16), nullable=False),
    Column("path", Text, nullable=False),
    Column("manifest", Text, nullable=False),
    Column("metrics", Text),
    Column("public_key", LargeBinary),
    Column("signature", LargeBinary),
    Column("registered_at_s", BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """One version of one model."""

    manifest: Manifest
    manifest_text: str
    """What the signature is of"""
    path: Path
    """Where its files were when it was registered"""
    stage: Stage
    metrics: dict[str, Any] | None
    public_key: bytes | None
    """Of who signed it; None: nobody did"""
    signature: bytes | None
    registered_at_s: int
    """Since 1970"""

    @property
    def reference(self) -> str:
        """NAME:VERSION."""
        return f"{self.manifest.name}:{self.manifest.version}"


class Registry:
    """A database of models. Every method raises ``InvalidSetting`` where it cannot be reached."""

    def __init__(self, url: str | None) -> None:
        """Open it, and make its tables where there are none. Raises ``InvalidSetting`` for ones that are newer."""
        parsed = _parse(url)
        self.shown_url = parsed.render_as_string(hide_password=True)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        try:
            # A command makes a few short transactions; what is kept open between them would be in others' way.
            self._engine = create_engine(
                parsed, poolclass=NullPool, connect_args={"timeout": _BUSY_TIMEOUT_S} if is_sqlite else {}
            )
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise MissingExtra(
                f"{self.shown_url} needs a driver that is not installed ({error}); install it, such as "
                "pip install 'psycopg[binary]' for postgresql+psycopg:"
            ) from error
        self._prepare()

    def add(
        self,
        path: Path,
        *,
        name: str,
        version: int | None = None,
        parent: str | None = None,
        recipe: str | None = None,
        data: Sequence[Path] = (),
        metrics: dict[str, Any] | None = None,
        key: Ed25519PrivateKey | None = None,
    ) -> RegisteredModel:
        """Hash a model's files, and register them as a candidate signed by ``key``, ``version`` or the next number.

        Raises ``InvalidSetting`` for a version that is taken or a name that cannot be one, ``NotRegistered`` for an
        unknown parent and ``ModelUnreadable`` for files that cannot be hashed.
        """
        require_name(name)
        taken = [model.manifest.version for model in self.models(name)]
        if version in taken:
            raise InvalidSetting(f"{name}:{version} is registered already; leave the version out for the next number")
        parent = None if parent is None else self.find(parent).reference
        manifest = Manifest(
            name=name,
            version=0,
            parent=parent,
            recipe=recipe,
            data=hash_files({str(file): file for file in data}),
            files=_hash_model(path),
        )
        for _ in range(_MAX_ATTEMPTS):
            # The number is signed, so the database cannot choose it; whoever comes second has to sign another.
            number = version or self._next_version(name)
            text = msgspec.structs.replace(manifest, version=number).encode()
            row = {
                "name": name,
                "version": number,
                "stage": "candidate",
                "path": str(path.resolve()),
                "manifest": text,
                "metrics": None if metrics is None else json.dumps(metrics),
                "public_key": None if key is None else key.public_key().public_bytes_raw(),
                "signature": None if key is None else key.sign(text.encode()),
                "registered_at_s": int(time.time()),
            }
            try:
                with self._transaction() as connection:
                    connection.execute(insert(_models).values(row))
            except IntegrityError:
                if version is not None:
                    break
            else:
                return self.find(f"{name}:{number}")
        raise InvalidSetting(f"{name} is being registered by others at the same time; try again")

    def models(self, name: str | None = None) -> list[RegisteredModel]:
        """Return all versions, of ``name`` alone if given, by name and version. Raises ``NotVerified`` for damage."""
        query = select(_models).order_by(_models.c.name, _models.c.version)
        if name is not None:
            query = query.where(_models.c.name == name)
        with self._transaction() as connection:
            return [_read(row) for row in connection.execute(query)]

    def find(self, reference: str) -> RegisteredModel:
        """Return what NAME:VERSION, NAME@production or NAME means.

        NAME alone is its version in production, else the highest that is not retired. Raises ``NotRegistered``.
        """
        wanted = parse_reference(reference)
        versions = self.models(wanted.name)
        if not versions:
            raise NotRegistered(
                f"no model {wanted.name} is registered in {self.shown_url}; penstock models list shows those that are"
            )
        numbers = ", ".join(str(model.manifest.version) for model in versions)
        if wanted.version is not None:
            for model in versions:
                if model.manifest.version == wanted.version:
                    return model
            raise NotRegistered(f"{wanted.name} has no version {wanted.version}; it has {numbers}")
        in_production = [model for model in versions if model.stage == "production"]
        if wanted.in_production and not in_production:
            raise NotRegistered(
                f"no version of {wanted.name} is in production ({numbers}); put one there with penstock models stage"
            )
        not_retired = [model for model in versions if model.stage != "retired"]
        if not not_retired:
            raise NotRegistered(f"every version of {wanted.name} is retired ({numbers}); name the one that you mean")
        return (in_production or not_retired)[-1]

    def set_stage(self, reference: str, stage: Stage) -> tuple[RegisteredModel, list[int]]:
        """Put a version in ``stage``; return it and the versions that were in production before it and now are retired.

        At most one version of a name is in production at any time. Raises ``NotRegistered``.
        """
        model = self.find(reference)
        name, version = model.manifest.name, model.manifest.version
        others = (_models.c.name == name) & (_models.c.version != version) & (_models.c.stage == "production")
        former: list[int] = []
        with self._transaction() as connection:
            # Two that promote at once take turns: here where rows can be locked, at the update where the file is.
            connection.execute(select(_models.c.version).where(_models.c.name == name).with_for_update()).all()
            this = update(_models).where(_models.c.name == name, _models.c.version == version)
            connection.execute(this.values(stage=stage))
            if stage == "production":
                former = list(connection.scalars(select(_models.c.version).where(others)))
                connection.execute(update(_models).where(others).values(stage="retired"))
        return self.find(model.reference), former

    def _next_version(self, name: str) -> int:
        with self._transaction() as connection:
            highest = connection.scalar(select(func.max(_models.c.version)).where(_models.c.name == name))
        return (highest or 0) + 1

    def _prepare(self) -> None:
        with self._transaction() as connection:
            is_there = inspect(connection).has_table(_models.name)
        if not is_there:
            self._make_tables()
        with self._transaction() as connection:
            version = connection.scalar(select(func.max(_registry.c.schema_version)))
        if version != SCHEMA_VERSION:
            raise InvalidSetting(
                f"the registry {self.shown_url} has tables of version {version}, and this Penstock knows version "
                f"{SCHEMA_VERSION}; use a Penstock that is as new as the one that made it"
            )

    def _make_tables(self) -> None:
        # PostgreSQL's IF NOT EXISTS fails where another process makes the same table, with one of two errors.
        with suppress(IntegrityError, InvalidSetting):
            self._make_tables_once()
            return
        self._make_tables_once()

    def _make_tables_once(self) -> None:
        with self._transaction() as connection:
            connection.execute(CreateTable(_registry, if_not_exists=True))
            if connection.scalar(select(_registry.c.schema_version)) is None:
                connection.execute(insert(_registry).values(schema_version=SCHEMA_VERSION))
            # Last: where it is, all is there.
            connection.execute(CreateTable(_models, if_not_exists=True))

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """Yield a connection; what was done with it holds at the end, and nothing of it after an exception."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise InvalidSetting(
                f"the registry {self.shown_url} cannot be used: {reason}; check registry.url, and its database",
                param="registry.url",
            ) from error


def _parse(url: str | None) -> URL:
    if url is None:
        home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        file = home / "penstock" / "registry.db"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidSetting(
                f"{file.parent} cannot be made: {error.strerror}; set registry.url", param="registry.url"
            ) from error
        return URL.create("sqlite", database=str(file))
    try:
        return make_url(url)
    except ArgumentError as error:
        # What was given may hold a password.
        raise InvalidSetting(
            "registry.url is no database URL; write one like sqlite:////srv/models/registry.db or "
            "postgresql+psycopg://host/models",
            param="registry.url",
        ) from error


def _hash_model(path: Path) -> tuple[FileRecord, ...]:
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelUnreadable(f"{path} holds no config.json; give the directory that holds it and the weights")
    return hash_files(model_files(path))


def _read(row: Row[Any]) -> RegisteredModel:
    """Return what a row says. Raises ``NotVerified`` if its parts do not belong together."""
    try:
        manifest = msgspec.json.decode(row.manifest, type=Manifest)
    except msgspec.DecodeError as error:
        raise NotVerified(f"the record of {row.name}:{row.version} is damaged ({error}); {RESTORE_RECORD}") from error
    if (manifest.name, manifest.version) != (row.name, row.version):
        raise NotVerified(
            f"the record of {row.name}:{row.version} is that of {manifest.name}:{manifest.version}; {RESTORE_RECORD}"
        )
    return RegisteredModel(
        manifest=manifest,
        manifest_text=row.manifest,
        path=Path(row.path),
        stage=row.stage,
        metrics=None if row.metrics is None else json.loads(row.metrics),
        public_key=row.public_key,
        signature=row.signature,
        registered_at_s=row.registered_at_s,
    )
