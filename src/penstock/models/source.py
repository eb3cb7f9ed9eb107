"""From what a person types to a directory with a model in it."""

from pathlib import Path

from penstock.errors import ModelUnreadable
from penstock.gguf import is_gguf

DEMO_MODEL = "penstock-mini"
"""The model that ships with the package."""

_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Return where ``name`` is: the demo model, a directory, a GGUF file, or a hub id, fetched or found in the cache.

    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean elsewhere. Raises ``ModelUnreadable``.
    """
    if name == DEMO_MODEL:
        return Path(__file__).parents[1] / "assets" / DEMO_MODEL
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelUnreadable(f"{path} is no model: a directory in Hugging Face layout has a config.json")
    if path.is_dir() or (is_gguf(path) and path.is_file()):
        return path
    if path.exists():
        raise ModelUnreadable(
            f"{path} is a file, and not a GGUF one; give the directory that holds config.json and the weights"
        )
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelUnreadable(
            f"there is no model {name!r}: give a directory in Hugging Face layout, a GGUF file, a hub id like "
            f"organisation/name, {DEMO_MODEL}, or registry:NAME if it is registered"
        )
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    # Slow to import, and most starts do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelUnreadable(
            f"{name} is no directory here and cannot be had from the hub ({type(error).__name__}: {reason}); check the "
            "spelling, HF_TOKEN for a gated model, or the network; or give a directory"
        ) from error
