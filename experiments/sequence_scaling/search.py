"""The best plan of a layer on C devices, and what it loses against perfect division."""

import dataclasses
from collections.abc import Iterator, Sequence

from experiments.sequence_scaling.platforms import Platform
from experiments.sequence_scaling.program import Layer, Pass, Plan, by_heads, simulate

WIDTHS = (128, 256, 512, 1024, 2048, 4096)
# Rows of a stripe. Shorter stripes are all latency; longer ones have too much of the work that
# every device repeats.
FEWEST, MOST = 1024, 16384


@dataclasses.dataclass(frozen=True)
class Space:
    """The plans to choose from."""

    layout: str = "striped"
    widths: Sequence[int] = WIDTHS  # Rows b of a block.
    splits: Sequence[int] = (1, 2, 4)  # Numbers of devices that divide the heads.


ANY = Space()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The simulated times of a layer on C devices."""

    platform: Platform
    layer: Layer
    devices: int
    plan: Plan | None  # None where the devices divide nothing but the heads.
    passes: tuple[Pass, Pass]  # Forward and backward.
    alone: tuple[Pass, Pass]  # On one device.

    @property
    def seconds(self) -> float:
        """Time of both passes."""
        return self.passes[0].seconds + self.passes[1].seconds

    @property
    def efficiency(self) -> float:
        """Time of both passes on one device over C, over the time on C devices."""
        return (self.alone[0].seconds + self.alone[1].seconds) / self.devices / self.seconds

    @property
    def communication(self) -> float:
        """Share of the time in collectives outside the solve."""
        return sum(x.communication for x in self.passes) / self.seconds

    @property
    def repeated(self) -> float:
        """Share of the time in work that one device does not have, or has only once.

        That is the inverses, which every device computes for all blocks of its heads, and the
        backward pass's products beyond those of one device.
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
        """Share of the time lost to imbalance and dependency: all that is left."""
        return 1 - self.efficiency - self.communication - self.repeated


def outcome(platform: Platform, layer: Layer, devices: int, plan: Plan | None) -> Outcome:
    """Simulates one plan."""
    case = platform, layer, devices
    passes = simulate(*case, plan) if plan else by_heads(*case)
    return Outcome(*case, plan, passes, by_heads(platform, layer, 1))


def plans(layer: Layer, devices: int, space: Space) -> Iterator[Plan]:
    """Yields the plans whose stripes have a sensible number of rows."""
    for split in space.splits:
        if layer.kv_heads % split or devices % split or devices == split:
            continue
        members = devices // split
        fitting = [width for width in space.widths if FEWEST <= members * width <= MOST]
        yield from (Plan(space.layout, x, split) for x in fitting or [min(space.widths)])


def best(platform: Platform, layer: Layer, devices: int, space: Space = ANY) -> Outcome:
    """Returns the plan that is fastest for both passes together."""
    candidates: list[Plan | None] = [*plans(layer, devices, space)]
    if devices in space.splits or devices == 1:
        candidates.append(None)
    found = [outcome(platform, layer, devices, plan) for plan in candidates]
    return min(found, key=lambda x: x.seconds)
