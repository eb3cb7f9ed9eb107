"""Whether a registered model is what was registered, and who vouches for it."""

from dataclasses import dataclass
from pathlib import Path

from penstock.errors import NotVerified
from penstock.registry.keys import is_signed_by, key_id, read_public_key
from penstock.registry.manifest import hash_files, model_files
from penstock.registry.store import RESTORE_RECORD, RegisteredModel
from penstock.units import counted, format_bytes

_MAX_NAMED = 5
"""Files of each kind that an error names"""


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found of a model all of whose files are as registered."""

    model: RegisteredModel
    is_trusted: bool
    """Whether it is signed by the key that was asked for, and not just by the one that was recorded with it"""

    def describe(self) -> str:
        """Return a line for people."""
        model = self.model
        if model.public_key is None:
            signed = "not signed"
        else:
            trust = "the key that counts" if self.is_trusted else "as recorded; compared with no key of yours"
            signed = f"signed by {key_id(model.public_key)} ({trust})"
        files, size = counted(len(model.manifest.files), "file"), format_bytes(model.manifest.num_bytes)
        return f"{model.reference} ({model.stage}): {files}, {size}, as registered; {signed}"


def verify(model: RegisteredModel, public_key: Path | None) -> Verified:
    """Return what vouches for ``model``, whose files have all been read; with ``public_key``, only its signature does.

    Raises ``NotVerified`` if the signature is missing, by another key or of another record, or if any file is changed,
    missing or additional; ``ModelUnreadable`` for one that cannot be hashed; ``InvalidSetting`` for no key.
    """
    _verify_signature(model, public_key)
    if not model.path.exists():
        raise NotVerified(
            f"{model.reference} was registered in {model.path}, and nothing is there now; move it back, link to "
            f"where it is (ln -s NEW {model.path}), or register it there as a new version"
        )
    recorded = {file.path: file for file in model.manifest.files}
    present = model_files(model.path)
    missing, added = sorted(recorded.keys() - present.keys()), sorted(present.keys() - recorded.keys())
    common = {path: file for path, file in present.items() if path in recorded}
    # What is missing or of another size is found without reading the rest.
    changed = [path for path, file in common.items() if file.stat().st_size != recorded[path].size_bytes]
    if not (missing or added or changed):
        changed = [file.path for file in hash_files(common) if file != recorded[file.path]]
    complaints = [
        f"{_named(paths)} {what}"
        for paths, what in ((changed, "changed"), (missing, "missing"), (added, "added"))
        if paths
    ]
    if complaints:
        raise NotVerified(
            f"{model.path} is not what was registered as {model.reference}: {'; '.join(complaints)}; put back what was "
            f"registered, or register what is there as a new version: penstock models add {model.path} --name "
            f"{model.manifest.name}"
        )
    return Verified(model, is_trusted=public_key is not None)


def _verify_signature(model: RegisteredModel, public_key: Path | None) -> None:
    wanted = None if public_key is None else read_public_key(public_key)
    if model.public_key is None:
        if wanted is None:
            return
        raise NotVerified(
            f"{model.reference} is not signed, and has to be by {key_id(wanted)} ({public_key}); have the owner of "
            "that key register it, with --key"
        )
    if wanted is not None and wanted != model.public_key:
        raise NotVerified(
            f"{model.reference} is signed by {key_id(model.public_key)}, and has to be by {key_id(wanted)} "
            f"({public_key}); have the owner of that key register it, or give the other public key if you trust it"
        )
    if not is_signed_by(model.public_key, model.signature or b"", model.manifest_text.encode()):
        raise NotVerified(f"the signature of {model.reference} is not one of its record; {RESTORE_RECORD}")


def _named(paths: list[str]) -> str:
    more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
    return ", ".join(paths[:_MAX_NAMED]) + more
