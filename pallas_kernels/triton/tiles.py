"""Sizes of a kernel's tiles."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """R rows of a block, C columns of a tile (C divides R), and how the compiler lays them out.

    Attributes:
      rows: R, a power of two of at least 16; of `solve` 64 or 128.
      columns: C, a power of two of at least 16.
      warps: Warps of a program.
      stages: Tiles in flight in the software pipeline of the inner loop.
      lookahead: For `solve`: how many of the last blocks take the short path.
      head_group: For `solve`: heads whose blocks are solved in turn, before those of the next;
        0 for all heads.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    lookahead: int = 1
    head_group: int = 0

    def __post_init__(self):
        assert self.rows % self.columns == 0, self
