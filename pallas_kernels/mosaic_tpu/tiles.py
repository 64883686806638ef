"""Sizes of a kernel's tiles."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """R rows and C columns.

    Attributes:
      rows: R, a multiple of 128; a step of the grid solves them.
      columns: C, a multiple of 128 that divides R; what a copy from HBM brings.
    """

    rows: int
    columns: int

    @property
    def vmem_limit_bytes(self):
        return None

    @classmethod
    def choose(cls, dtype, s, d):
        return cls(128, 128)
