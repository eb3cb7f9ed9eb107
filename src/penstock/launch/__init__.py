"""Putting the parts together: settings, the engine and its process, the server."""
