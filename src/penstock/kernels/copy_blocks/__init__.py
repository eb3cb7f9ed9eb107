"""Copying whole cache blocks."""
