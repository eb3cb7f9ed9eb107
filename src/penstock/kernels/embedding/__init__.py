"""Tokens' vectors."""
