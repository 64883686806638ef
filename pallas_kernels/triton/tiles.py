"""Tile sizes of the Triton kernels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The rows of a block, the columns of a tile, and the compiler's parameters.

    Attributes:
      rows: R, a power of two of at least 16; 64 or 128 for `solve`.
      columns: C, a power of two of at least 16 that divides R.
      warps: Warps of a program.
      stages: Tiles in flight in the software pipeline of the inner loop.
      lookahead: For `solve`: the number of last blocks that take the short path.
      head_group: For `solve`: the number of heads that are solved side by side before the next
        group of heads starts; 0 for all heads.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    lookahead: int = 1
    head_group: int = 0

    def __post_init__(self):
        assert self.rows % self.columns == 0, self
