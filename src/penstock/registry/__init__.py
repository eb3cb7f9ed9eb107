"""Models by name and version: which files they are, where they come from, who vouches for them, and what they are for.

Files stay where they are; the registry knows their hashes.
"""

import importlib.util

from penstock.errors import MissingExtra


def require_registry() -> None:
    """Raise ``MissingExtra`` where what the registry is built on is not installed."""
    missing = [name for name in ("sqlalchemy", "cryptography") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"the registry needs {' and '.join(missing)}; pip install 'penstock[registry]'")
