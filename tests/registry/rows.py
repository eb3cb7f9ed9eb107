"""What somebody who can write to the database may do to its rows."""

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool


def execute(url: str, statement: str) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.exec_driver_sql(statement)
