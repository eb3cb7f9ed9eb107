"""Rotating queries and keys, and keys' and values' way into the cache."""
