"""The OpenAI-compatible API over an engine client."""

from penstock.server.app import create_app
from penstock.server.config import ServerConfig

__all__ = ["ServerConfig", "create_app"]
