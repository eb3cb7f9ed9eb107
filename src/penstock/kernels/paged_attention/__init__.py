"""Attention over cached keys and values, read block by block."""
