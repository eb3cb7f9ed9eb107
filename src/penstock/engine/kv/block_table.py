"""The blocks of one sequence, in order."""

from array import array


class BlockTable:
    """Block ids for positions ``num_dropped * P`` and up; the blocks before slid out of the window."""

    __slots__ = ("block_ids", "chain", "num_dropped", "num_registered")

    def __init__(self) -> None:
        self.block_ids = array("i")
        self.num_dropped = 0
        self.num_registered = 0
        """Blocks, dropped ones included, whose content has been named so far."""
        self.chain = b""
        """Name of the last of those; the salt's root before the first."""

    def __len__(self) -> int:
        """Number of blocks, dropped ones included."""
        return self.num_dropped + len(self.block_ids)
