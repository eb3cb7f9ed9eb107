"""Penstock: compress, serve, route, watch and operate language models in production."""

__version__ = "0.1.0"
