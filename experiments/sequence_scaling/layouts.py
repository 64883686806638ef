"""Which device holds which rows, and the rows × columns that each device works on at each step.

The sequence is cut into blocks of b rows and solved in stripes of C consecutive blocks, on C
devices. In the striped layout every device holds one block of every stripe; in the contiguous and
zigzag layouts one device holds most of a stripe.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

LAYOUTS = ("contiguous", "zigzag", "striped")


def owners(layout: str, devices: int, blocks: int) -> np.ndarray:
    """Returns the device of every block, int `[blocks]`, a multiple of C, for zigzag of 2C."""
    block = np.arange(blocks)
    if layout == "striped":
        return block % devices
    if layout == "contiguous":
        return block * devices // blocks
    chunk = block * 2 * devices // blocks
    return np.minimum(chunk, 2 * devices - 1 - chunk)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Rows and columns of one head, for N stripes on C devices."""

    stripe: int  # Rows of a stripe.
    held: np.ndarray  # Rows of each stripe that each device holds `[N,C]`.
    attention: np.ndarray  # Pairs of a query and a key not after it, by the query's device `[C]`.

    @classmethod
    def for_layout(cls, layout: str, devices: int, length: int, width: int) -> Counts:
        """Counts a sequence padded to whole stripes, for zigzag an even number of them."""
        unit = 2 * devices if layout == "zigzag" else devices
        blocks = unit * math.ceil(length / (unit * width))
        owner = owners(layout, devices, blocks)
        held = np.zeros((blocks // devices, devices), np.int64)
        np.add.at(held, (np.arange(blocks) // devices, owner), width)
        pairs = np.arange(blocks) * width**2 + width * (width + 1) // 2
        attention = np.bincount(owner, weights=pairs, minlength=devices).astype(np.int64)
        return cls(devices * width, held, attention)

    @property
    def length(self) -> int:
        """All rows, padding included."""
        return len(self.held) * self.stripe

    def updates(self, *, backward: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows from which step t subtracts stripe t−1.

        Backward, the stripes are solved from the last to the first. The rows are those of stripe t
        and those of later stripes, each `[N,C]`; the columns are a stripe's.
        """
        first = (self.held[::-1] if backward else self.held).copy()
        later = first.sum(0) - np.cumsum(first, 0)
        first[0], later[0] = 0, 0  # Nothing is solved before the first step.
        return first, later

    def key_gradient(self) -> np.ndarray:
        """Returns rows × columns on both sides of the diagonal, by the rows' device `[C]`."""
        return self.held.sum(0) * self.length
