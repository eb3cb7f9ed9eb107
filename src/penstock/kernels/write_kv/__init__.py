"""Storing keys and values in the cache."""
