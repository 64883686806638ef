"""Who holds which rows, and the rows × columns that each device works on, step by step.

The sequence is cut into blocks of b rows, and solved by stripes of m·C consecutive blocks. Under
the striped layout every one of C devices holds m blocks of every stripe; under the other two a
whole stripe lies on one device, mostly.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

LAYOUTS = ("contiguous", "zigzag", "striped")


def owners(layout: str, devices: int, blocks: int) -> np.ndarray:
    """The device of every block: int `[blocks]`, which 2C must divide for zigzag, C otherwise."""
    block = np.arange(blocks)
    if layout == "striped":
        return block % devices
    if layout == "contiguous":
        return block * devices // blocks
    if layout == "zigzag":
        chunk = block * 2 * devices // blocks
        return np.minimum(chunk, 2 * devices - 1 - chunk)
    raise ValueError(f"layout is one of {', '.join(LAYOUTS)}; got {layout!r}")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Rows and columns of one head, of N stripes on C devices.

    Attributes:
      stripe: Rows of a stripe.
      held: Rows of each stripe that each device holds `[N,C]`.
      attention: Pairs of a query and a key not after it `[C]`.
    """

    stripe: int
    held: np.ndarray
    attention: np.ndarray

    @classmethod
    def of(cls, layout: str, devices: int, length: int, width: int, m: int = 1) -> Counts:
        """Of a sequence that is padded to whole stripes, an even number of them for zigzag."""
        a_stripe = m * devices
        unit = 2 * a_stripe if layout == "zigzag" else a_stripe
        blocks = unit * math.ceil(length / (unit * width))
        owner = owners(layout, devices, blocks)
        stripe = np.arange(blocks) // a_stripe
        held = np.zeros((blocks // a_stripe, devices), np.int64)
        np.add.at(held, (stripe, owner), width)
        pairs = np.arange(blocks) * width**2 + width * (width + 1) // 2
        attention = np.bincount(owner, weights=pairs, minlength=devices).astype(np.int64)
        return cls(a_stripe * width, held, attention)

    @property
    def length(self) -> int:
        """Rows of all, padding included."""
        return len(self.held) * self.stripe

    def updates(self, *, backward: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Rows from which stripe t−1 is taken off at step t: of stripe t, and of later ones.

        Args:
          backward: The stripes are solved from the last to the first.

        Returns:
          Twice `[N,C]`; the columns are those of a stripe.
        """
        first = (self.held[::-1] if backward else self.held).copy()
        later = first.sum(0) - np.cumsum(first, 0)
        first[0], later[0] = 0, 0  # Nothing is solved before the first step.
        return first, later

    def key_gradient(self) -> np.ndarray:
        """Rows × columns on both sides of the diagonal, by the device of the rows `[C]`."""
        return self.held.sum(0) * self.length
