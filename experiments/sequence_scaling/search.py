"""The best plan of a layer on C devices, and what it loses against perfect division."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from experiments.sequence_scaling.platforms import Platform
from experiments.sequence_scaling.program import (
    Layer,
    Pass,
    Plan,
    by_heads,
    simulate,
)

# Blocks of b rows, m of a device in a stripe: one block of any width, or several as wide as the
# tiles of the kernels.
ONE_BLOCK = tuple((width, 1) for width in (128, 256, 512, 1024, 2048, 4096))
DEFAULT = ((256, 1),)  # `mesh.stripe`.
SEVERAL = tuple((128, m) for m in (2, 4, 8, 16, 32, 64))
# Rows of a stripe: with fewer, steps are all latency; with more, too much of the work is that
# which every device repeats.
FEWEST, MOST = 1024, 16384


@dataclasses.dataclass(frozen=True)
class Space:
    """Plans to choose from; what the program can do is there by itself.

    Attributes:
      layout: One of `layouts.LAYOUTS`.
      shapes: b and m.
      splits: Devices that share the heads.
      sharing: Whether a stripe's heads may be shared out among the devices.
    """

    layout: str = "striped"
    shapes: Sequence[tuple[int, int]] = ONE_BLOCK
    splits: Sequence[int] = (1, 2, 4)
    sharing: Sequence[bool] = (False,)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A layer on C devices.

    Attributes:
      plan: None where the heads alone are divided.
      alone: The passes on one device.
    """

    platform: Platform
    layer: Layer
    devices: int
    plan: Plan | None
    passes: tuple[Pass, Pass]
    alone: tuple[Pass, Pass]

    @property
    def diagonal_blocks(self) -> int | None:
        """Rows of the diagonal blocks of a stripe."""
        if self.plan is None:
            return None
        heads = self.layer.kv_heads // self.plan.split
        stripe = self.plan.stripe(self.devices)
        return self.platform.device.diagonal(stripe, heads, self.layer.length).rows

    @property
    def forward(self) -> float:
        """Seconds of the forward pass."""
        return self.passes[0].seconds

    @property
    def seconds(self) -> float:
        """Seconds of both passes."""
        return self.forward + self.passes[1].seconds

    @property
    def perfect(self) -> float:
        """Seconds of both on one device, over C."""
        return (self.alone[0].seconds + self.alone[1].seconds) / self.devices

    @property
    def efficiency(self) -> float:
        """Of both passes, against perfect division."""
        return self.perfect / self.seconds

    @property
    def communication(self) -> float:
        """The share of the time in collectives outside the solve."""
        return sum(x.communication for x in self.passes) / self.seconds

    @property
    def repeated(self) -> float:
        """The share of the time in work that one device does not have, or has once.

        That is inverses, which every device makes of all blocks of its heads, and the products
        of the backward pass beyond those of one device's.
        """
        inverses = sum(x.inverses for x in self.passes)
        shared = sum(x.inverses for x in self.alone) / self.devices
        products = 0.0
        if self.plan is not None:
            device, pairs = self.platform.device, self.layer.kv_heads * self.layer.length**2 / 2
            extra = device.update + 2 * device.key_gradient - device.backward
            products = pairs * extra / self.devices
        return (inverses - shared + products) / self.seconds

    @property
    def lost(self) -> float:
        """The share of the time that imbalance and dependency take: all that is left."""
        return 1 - self.efficiency - self.communication - self.repeated


def outcome(platform: Platform, layer: Layer, devices: int, plan: Plan | None) -> Outcome:
    """Of one plan."""
    if plan is None:
        passes = by_heads(platform, layer, devices)
    else:
        passes = simulate(platform, layer, devices, plan)
    return Outcome(platform, layer, devices, plan, passes, by_heads(platform, layer, 1))


def plans(layer: Layer, devices: int, space: Space) -> Iterator[Plan]:
    """Those worth playing."""
    for split in space.splits:
        if layer.kv_heads % split or devices % split or devices == split:
            continue
        members = devices // split
        fitting = [x for x in space.shapes if FEWEST <= members * x[0] * x[1] <= MOST]
        for width, blocks in fitting or [min(space.shapes)]:
            yield from (Plan(space.layout, width, blocks, split, x) for x in space.sharing)


def best(platform: Platform, layer: Layer, devices: int, space: Space | None = None) -> Outcome:
    """The fastest of both passes together."""
    space = space or Space()
    candidates: list[Plan | None] = [*plans(layer, devices, space)]
    if devices in space.splits or devices == 1:
        candidates.append(None)
    found = [outcome(platform, layer, devices, plan) for plan in candidates]
    return min(found, key=lambda x: x.seconds)
