"""How a model's makers have its hidden states pooled into one vector: sentence-transformers' 1_Pooling/config.json."""

from pathlib import Path

from penstock.errors import ModelUnreadable
from penstock.json_objects import read_json_object
from penstock.protocol import Pooling

_MODES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "lasttoken": "last",
}
"""Names of modes, as keys that are true, and as the one value of ``pooling_mode``"""


def read_pooling(path: Path) -> Pooling | None:
    """Return what 1_Pooling/config.json in directory ``path`` says; None where there is none.

    Raises ``ModelUnreadable`` where it asks for what is not supported.
    """
    file = path / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    given = read_json_object(file)
    modes = [name for name, value in given.items() if name.startswith("pooling_mode_") and value is True]
    modes += [given["pooling_mode"]] if isinstance(given.get("pooling_mode"), str) else []
    found = {_MODES.get(name) for name in modes}
    if len(found) == 1:
        pooling = found.pop()
        if pooling is not None:
            return pooling
    raise ModelUnreadable(
        f"{file} asks for embeddings pooled by {', '.join(modes) or 'nothing'}, and only mean and last are supported; "
        "choose one with --pooling, or do not use this model for embeddings"
    )
