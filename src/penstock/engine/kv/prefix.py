"""Names for cached prefixes: each full block is known by a hash of its tokens and of all blocks before it."""

import hashlib
import os
from array import array
from collections.abc import Sequence

_DIGEST_BYTES = 16


class PrefixHasher:
    """Hash chains over blocks of token ids.

    The key is drawn per process, so that nobody can craft prompts whose blocks collide with another tenant's.
    """

    def __init__(self) -> None:
        self._key = os.urandom(32)

    def root(self, salt: str) -> bytes:
        """Return the parent of a first block; chains of different salts never meet."""
        return hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES, key=self._key, person=b"root").digest()

    def block(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """Return the name of the block that holds ``token_ids`` and follows ``parent``."""
        tokens = array("q", token_ids).tobytes()
        return hashlib.blake2b(parent + tokens, digest_size=_DIGEST_BYTES, key=self._key).digest()
