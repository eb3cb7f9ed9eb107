"""What seeing takes beside weights and features, worked out before anything is loaded."""

from dataclasses import dataclass

_FLOAT32_BYTES = 4
MOST_BESIDE = 0.25
"""Of what is held of a picture that takes several steps, what may be held of others that are begun before it is done"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerShape:
    """The sizes of a vision tower and its projector that decide the memory of encoding."""

    width: int
    """Of a row, which most layers make of a patch"""
    num_heads: int
    mlp_width: int
    patch_size: int
    """Pixels on a side"""
    frames_each: int = 1
    """Frames in a patch"""
    merged: int = 1
    """Patches that become a row of the projector"""
    projector_width: int
    """The widest row in it"""
    num_results: int = 1
    """Layers whose results it reads"""

    @property
    def head_dim(self) -> int:
        """Of each head."""
        return self.width // self.num_heads

    @property
    def patch_bytes(self) -> int:
        """Of a patch's pixels in one frame."""
        return 3 * self.patch_size**2


def encoding_peak_bytes(
    shape: TowerShape, *, image_bytes: int, num_tiles: int, rows_at_once: int, element_bytes: int
) -> int:
    """Return an upper bound on what encoding holds at a time beside weights and features.

    ``image_bytes`` are those of the largest image's, tile's or frame's pixels, of which a picture has ``num_tiles``;
    ``rows_at_once`` those of a part; ``element_bytes`` those of an activation. Images and tiles go through the tower
    one after another, or as many small ones together as a part has rows for:

    - pixels, as they are cut into patches: twice, and by frames that are missing;
    - rows, their queries, keys and values, angles, and results of layers that are kept, of the largest;
    - what a part makes of its rows in the widest moment: in attention, in the feed-forward, or on the way in and out;
    - the tower's result for all tiles, and what the projector reads and writes;
    - as much again, but for a part, as ``MOST_BESIDE`` allows.
    """
    num_patches = image_bytes // shape.patch_bytes
    num_rows = max(num_patches + 1, rows_at_once)
    patches = 3 * shape.frames_each * max(num_tiles * image_bytes, rows_at_once * shape.patch_bytes)
    angles = 4 * num_rows * shape.head_dim * _FLOAT32_BYTES
    held = num_rows * (5 + 2 * (shape.num_results - 1)) * shape.width * element_bytes + angles
    patch_values = shape.frames_each * shape.patch_bytes
    widest = max(5 * shape.width, 3 * shape.mlp_width, 3 * patch_values, 3 * shape.projector_width)
    part = rows_at_once * (2 * shape.width + widest) * max(element_bytes, _FLOAT32_BYTES)
    results = max(num_tiles * (num_patches + 1), rows_at_once)
    projected = shape.num_results * shape.width + 2 * shape.projector_width
    after = results * projected // shape.merged * max(element_bytes, _FLOAT32_BYTES)
    return int((1 + MOST_BESIDE) * (patches + held + after)) + part
