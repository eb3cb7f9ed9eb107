"""Names for cached prefixes: each full block is known by a hash of its tokens and of all blocks before it."""

import hashlib
import os
from array import array
from collections.abc import Sequence

from penstock.protocol import Picture

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

    def block(self, parent: bytes, token_ids: Sequence[int], seen: bytes = b"") -> bytes:
        """Return the name of the block that holds ``token_ids``, shows what is ``seen`` and follows ``parent``."""
        tokens = array("q", token_ids).tobytes()
        return hashlib.blake2b(parent + tokens + seen, digest_size=_DIGEST_BYTES, key=self._key).digest()


def seen_in(pictures: Sequence[Picture], start: int, end: int) -> bytes:
    """Return which parts of which pictures tokens ``start`` to ``end`` stand for; nothing where it is all text.

    Different for pictures that differ in content, in size, in their place, or in what they add to positions.
    """
    return b"".join(
        repr((start - one.offset, one.num_tokens, one.grid, one.time_step, len(one.key))).encode() + one.key
        for one in pictures
        if one.offset < end and start < one.offset + one.num_tokens
    )


def prompt_digest(token_ids: Sequence[int], pictures: Sequence[Picture]) -> str:
    """Return a name of a whole prompt with what it shows."""
    tokens = array("q", token_ids).tobytes()
    return hashlib.blake2b(tokens + seen_in(pictures, 0, len(token_ids))).hexdigest()
