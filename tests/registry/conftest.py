"""A small directory that looks like a model, and real databases to register it in."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_POSTGRES = [*os.environ.get("PATH", "").split(":"), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "1_Pooling").mkdir(parents=True)
    (path / "config.json").write_text('{"architectures": ["A"]}')
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    return path


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Yield the URL of a server's database; the server is this session's own."""
    initdb = shutil.which("initdb", path=":".join(_POSTGRES))
    if initdb is None:
        pytest.skip("no PostgreSQL server here (apt install postgresql): the registry was not tested on one")
    # It refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="penstock-pg-"))
    if user is not None:
        shutil.chown(home, user)
    data, pg_ctl = f"{home}/data", str(Path(initdb).with_name("pg_ctl"))
    options = f"-c listen_addresses='' -c unix_socket_directories='{home}' -c fsync=off"

    def run(*command: str) -> None:
        subprocess.run(command, cwd=home, user=user, stdout=subprocess.DEVNULL, check=True)

    try:
        run(initdb, "-D", data, "-U", "penstock", "-A", "trust")
        run(pg_ctl, "-D", data, "-w", "-l", f"{home}/log", "-o", options, "start")
        yield f"postgresql+psycopg://penstock@/postgres?host={home}"
        run(pg_ctl, "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield an empty database's URL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/registry.db"
        return
    base: str = request.getfixturevalue("postgresql")
    import psycopg

    with psycopg.connect(base.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS models WITH (FORCE)")
        connection.execute("CREATE DATABASE models")
    yield base.replace("/postgres?", "/models?")
