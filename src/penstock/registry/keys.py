"""Keys that the user makes, and signatures by them: Ed25519 (RFC 8032), in PEM files as OpenSSL writes them."""

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from penstock.errors import InvalidSetting


def make_keys(path: Path) -> tuple[Path, str]:
    """Write a new private key to ``path``, readable by its owner alone, and its public key beside it.

    Returns the public key's file and id. Raises ``InvalidSetting`` rather than overwrite anything.
    """
    private = Ed25519PrivateKey.generate()
    public = private.public_key()
    public_path = path.with_name(f"{path.name}.pub")
    if public_path.exists():
        raise InvalidSetting(f"{public_path} exists; give another path, or remove it if nothing was signed by it")
    _write_once(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    _write_once(public_path, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), mode=0o644)
    return public_path, key_id(public.public_bytes_raw())


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Return the key to sign by. Raises ``InvalidSetting``."""
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidSetting(f"{path} holds no private key in PEM that is not encrypted: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidSetting(f"{path} holds a key of another kind than Ed25519; make one with penstock models keygen")
    return key


def read_public_key(path: Path) -> bytes:
    """Return the 32 bytes of a public key. Raises ``InvalidSetting``."""
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidSetting(
            f"{path} holds no public key in PEM: {error}; penstock models keygen writes it beside the private one"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidSetting(f"{path} holds a key of another kind than Ed25519; make one with penstock models keygen")
    return key.public_bytes_raw()


def key_id(public_key: bytes) -> str:
    """Return what people tell keys apart by."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def is_signed_by(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether ``signature`` is by this key and of this message."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _write_once(path: Path, content: bytes, *, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise InvalidSetting(f"{path} exists, and a key is never overwritten; give another path") from error
    except OSError as error:
        raise InvalidSetting(f"{path} cannot be written: {error.strerror}; give another path") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidSetting(f"the key {path} cannot be read: {error.strerror}") from error
