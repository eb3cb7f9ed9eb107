"""The OpenAI-compatible API over an engine client.

``server.app`` has ``create_app``; it is not imported here, so that reading settings does not wait for FastAPI.
"""

from penstock.server.config import ServerConfig

__all__ = ["ServerConfig"]
