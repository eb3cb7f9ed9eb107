"""Seeing: what every loaded vision encoder offers, and how its features get into a decoder.

E hidden width of the decoder, K placeholder tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from penstock.kernels.tensor import Tensor
from penstock.protocol import Picture

if TYPE_CHECKING:
    from penstock.models.vision.layers import Parts


@dataclass(frozen=True, slots=True)
class Inserted:
    """Features that take the place of placeholder tokens' embeddings in one forward pass."""

    rows: Tensor
    """[K] int64, which of the pass's tokens"""
    features: Tensor
    """[K, E] in the dtype of activations"""


class VisionEncoder(Protocol):
    """A loaded vision tower with its projector."""

    num_parameters: int
    patch_work: int
    """Multiply-adds that the tower's layers take for a patch that sees no other"""

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters in the dtype they run in."""

    def work(self, picture: Picture) -> int:
        """Return the multiply-adds that the tower's layers take for a picture."""

    def encoding(self, pictures: Sequence[Picture]) -> "Parts[list[Tensor]]":
        """Return the features [num_tokens, E] of each, in the dtype of the decoder's activations, in parts.

        No part takes longer, and nothing holds more memory meanwhile, for there being more pictures, tiles or frames.
        Pictures of any shapes; those of one shape are computed together, and none is padded. What is returned of a
        picture does not depend on the others.
        """

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Return the same, done at once."""
