"""What the simulator knows of devices and of what connects them: times of kernels, and links.

H200: from the committed benchmark of the Triton kernels and from what `measure` writes. TPUs:
from the committed roofline, which is a prediction. Links: data sheets, named beside each figure;
what none of these says, such as the latency of a hop, is assumed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp

from experiments.tpu_roofline import roofline
from lucid_jax.ops.precondition.triton_schedule import column_parts, rows_of_inverses

_EXPERIMENTS = pathlib.Path(__file__).parents[1]
_SMALL_KERNELS = pathlib.Path(__file__).parent / "results/h200.json"
# What is taken from the benchmarks.
_LENGTH, _HEADS, _KV_HEADS, _HEAD_DIM = 131072, 32, 4, 64
_SHAPE = f"1×{_LENGTH}, {_HEADS}/{_KV_HEADS}, {_HEAD_DIM}"
_SMALL_ROWS = 4 * 32768  # Of all heads, whose inverses `measure` makes.
_TRIANGLE = _LENGTH**2 / 2
_BANDWIDTH = 4.8e12  # Bytes a second of the memory: NVIDIA H200 data sheet.


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """Blocks whose inverses are made before the solve begins, which then takes them in turn.

    Attributes:
      rows: Rows of a block.
      start: Seconds before the first.
      seconds: From one block's solution to the next one's.
      inverse: Seconds of making the inverses, a row of one head.
      products: Those between blocks: "hidden", while blocks wait for each other; "after", on top
        of that; or "updates", each of a block with all before it.
    """

    rows: int
    start: float
    seconds: float
    inverse: float
    products: str


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
      update: Seconds a row × column of one head, of a product with a tile of `A`.
      key_gradient: The same of the key gradient, whose columns are those of both sides.
      backward: The same of the backward pass of one device's solve, key gradient included.
      attention: The same of causal softmax attention: forward, backward.
      rows: Rows of the tile that a program of an update takes.
      programs: Programs that run at once.
      launch: Seconds of starting an update, and of what takes its result on.
      chains: Heads whose chains of blocks run at once.
      diagonals: Those of the kernel, then those that the program may choose instead.
      triton: Whether updates share out their columns and inverses are chosen by the rules of
        the Triton backend, and attention takes whole rows of query heads where it can.
    """

    update: float
    key_gradient: float
    backward: float
    attention: tuple[float, float]
    rows: int
    programs: int
    launch: float
    chains: int
    diagonals: tuple[Diagonal, ...]
    triton: bool = False

    def diagonal(self, stripe: int, heads: int, length: int) -> Diagonal:
        """The blocks that the program chooses for stripes of so many rows."""
        measured = "NVIDIA H200", jnp.dtype(jnp.bfloat16), stripe, heads, length, _HEAD_DIM
        rows = rows_of_inverses(*measured) if self.triton else None
        return next((x for x in self.diagonals if x.rows == rows), self.diagonals[0])

    def updating(self, rows: int, columns: int, heads: int, most: int) -> float:
        """Seconds of an update: programs run in waves, and the last wave may be nearly empty.

        Args:
          rows: Of the device.
          columns: Of all of them.
          heads: Of the device.
          most: Rows that the kernel is started for, of which the others have no columns.
        """
        if not rows:
            return 0.0
        parts = column_parts(math.ceil(most / self.rows) * heads, columns) if self.triton else 1
        programs = math.ceil(rows / self.rows) * heads
        waves = math.ceil(programs * parts / self.programs)
        area = waves * self.programs * self.rows * math.ceil(columns / parts)
        # Written and read in float32, once more than where there are no parts.
        added_up = (parts - 1) * most * heads * 2 * 4 * _HEAD_DIM / _BANDWIDTH
        return self.launch + area * self.update + added_up

    def chain(self, rows: int, heads: int, diagonal: Diagonal, update: float) -> float:
        """Seconds of solving rows that depend on each other; `update` as in the attribute."""
        turns, blocks = math.ceil(heads / self.chains), math.ceil(rows / diagonal.rows)
        chain = turns * blocks * diagonal.seconds
        if diagonal.products == "updates":
            before = (i * diagonal.rows for i in range(1, blocks))
            size = diagonal.rows
            return chain + sum(self.updating(size, columns, heads, size) for columns in before)
        products = heads * rows**2 / 2 * update
        both = max(chain, products) if diagonal.products == "hidden" else chain + products
        return diagonal.start + both


@dataclasses.dataclass(frozen=True)
class Level:
    """Links among `size` devices, or among groups of them.

    Attributes:
      size: Devices, or groups, that they connect.
      bandwidth: Bytes a second that a device receives.
      hop: Seconds of one message.
      axes: Of a torus, whose messages pass from neighbour to neighbour; 0 for a switch, where
        a gather doubles what everyone has with every message.
    """

    size: int
    bandwidth: float
    hop: float
    axes: int

    def latency(self, members: int) -> float:
        """Seconds until something has come from everyone."""
        if members == 1:
            return 0.0
        if not self.axes:
            return self.hop * math.ceil(math.log2(members))
        return self.hop * self.axes * math.ceil(members ** (1 / self.axes) / 2)


@dataclasses.dataclass(frozen=True)
class Network:
    """Devices in groups (a host, a slice) and the links between groups.

    Attributes:
      start: Seconds of starting a collective.
      inner: Within a group.
      outer: Between groups.
    """

    start: float
    inner: Level
    outer: Level

    def gather(self, size: float, members: int, stride: int) -> float:
        """Seconds until every member has all `size` bytes; a reduce-scatter takes as long.

        Args:
          size: Bytes of all members together.
          members: Who gathers.
          stride: Every which device is a member: a group holds fewer of them.
        """
        if members == 1:
            return 0.0
        near = min(members, max(1, self.inner.size // stride))
        groups = math.ceil(members / near)
        # Each receives the shards of its like in other groups, then shares with its neighbours.
        outer = (groups - 1) * size / members / self.outer.bandwidth
        inner = (near - 1) / near * size / self.inner.bandwidth
        hops = self.inner.latency(near) + self.outer.latency(groups)
        return self.start + hops + outer + inner

    def exchange(self, size: float, members: int, stride: int = 1) -> float:
        """Seconds of an all-to-all, each with `size` bytes; `stride` as in `gather`."""
        if members == 1:
            return 0.0
        near = min(members, max(1, self.inner.size // stride))
        groups = math.ceil(members / near)
        hops = self.inner.latency(near) + self.outer.latency(groups)
        inner = (near - 1) / members * size / self.inner.bandwidth
        outer = (members - near) / members * size / self.outer.bandwidth
        return self.start + hops + inner + outer


@dataclasses.dataclass(frozen=True)
class Platform:
    """Devices and network, by name."""

    name: str
    device: Device
    network: Network


def _h200() -> Platform:
    update, key_gradient, backward, attention = _triton_kernels()
    # The update's tile and the multiprocessors of an H200.
    rows, programs = 128, 132
    small = _small_kernels()
    launch = small["update"][f"{rows}×512"] - programs * rows * 512 * update
    device = Device(
        update=update,
        key_gradient=key_gradient,
        backward=backward,
        attention=attention,
        rows=rows,
        programs=programs,
        launch=launch,
        chains=programs,
        diagonals=_diagonals(small, launch),
        triton=True,
    )
    network = Network(
        start=8e-6,  # Of NCCL: assumed.
        # NVIDIA H200 data sheet: NVLink of 900 GB/s in both directions. HGX: 8 on a switch.
        inner=Level(8, 450e9, 1e-6, axes=0),
        # NVIDIA DGX H200 data sheet: one ConnectX-7 of 400 Gb/s for every GPU.
        outer=Level(2**20, 50e9, 4e-6, axes=0),
    )
    return Platform("H200", device, network)


def _triton_kernels() -> tuple[float, float, float, tuple[float, float]]:
    """Update, key gradient, backward and attention, from times of the whole op at 131072."""
    path = _EXPERIMENTS / "triton_precondition/results/benchmark.json"
    records = json.loads(path.read_text())["records"]

    def seconds(op: str, passes: str, contestant: str, shape: str = _SHAPE) -> float:
        key = shape, op, passes
        [x] = [x for x in records if (x["shape"], x["op"], x["pass"]) == key]
        return 1e-3 * x["median_ms"][contestant]

    passes = ("forward", "forward+backward")
    lucid, softmax = (
        [seconds("lucid_attention", p, contestant) for p in passes]
        for contestant in ("lucid_attention", "softmax")
    )
    alone = f"1×{_LENGTH}, {_KV_HEADS}/{_KV_HEADS}, {_HEAD_DIM}"
    solve = seconds("precondition", "forward", "precondition", alone)
    backward = (lucid[1] - softmax[1]) - (lucid[0] - softmax[0])
    pairs = _KV_HEADS * _TRIANGLE
    # The transposed solve costs what the solve does; both sides are two triangles.
    return (
        solve / pairs,
        (backward - solve) / (2 * pairs),
        backward / pairs,
        (softmax[0] / (_HEADS * _TRIANGLE), (softmax[1] - softmax[0]) / (_HEADS * _TRIANGLE)),
    )


def _small_kernels() -> dict[str, dict[str, float]]:
    """Seconds, by what and by size."""
    found = json.loads(_SMALL_KERNELS.read_text())["microseconds"]
    return {name: {size: 1e-6 * us for size, us in times.items()} for name, times in found.items()}


def _diagonals(small: dict[str, dict[str, float]], launch: float) -> tuple[Diagonal, ...]:
    """Those of the Triton kernel, and larger ones by products with explicit inverses."""
    stripe = {int(rows): seconds for rows, seconds in small["stripe"].items()}
    fewest, most = min(stripe), max(stripe)
    a_row = (stripe[most] - stripe[fewest]) / (most - fewest)
    kernel = Diagonal(64, stripe[fewest] - fewest * a_row, 64 * a_row, 0.0, "hidden")
    explicit = []
    for rows in (512, 1024, 2048):
        # Of a library product: the kernel is taken to be no slower, as it reads half as much.
        seconds = small["block"][f"{rows}"]
        inverse = small["inverses"][f"{rows}"] / _SMALL_ROWS
        explicit.append(Diagonal(rows, 0.0, seconds, inverse, "updates"))
    return (kernel, *explicit)


# Bytes a second that a chip receives over ICI, dimensions of the torus, chips of the largest
# slice, and bytes a second over the data-center network. Google Cloud's pages "TPU v5e",
# "TPU v5p" and "TPU v6e": ICI of 1600 Gb/s a chip, 1200 GB/s and 800 GB/s in both directions;
# DCN of 6.4 Tb/s a pod of 256, 50 Gb/s a chip and 25.6 Tb/s a pod of 256.
_ICI = {
    "v5e": (200e9, 2, 256, 3.1e9),
    "v5p": (600e9, 3, 6144, 6.2e9),
    "v6e": (400e9, 2, 256, 12.5e9),
}


def _tpu(name: str) -> Platform:
    path = _EXPERIMENTS / "tpu_roofline/results/roofline.json"
    records = json.loads(path.read_text())["records"]
    [record] = [x for x in records if x["chip"] == name and x["shape"] == _SHAPE]
    chip = roofline.Chip.of(name)
    forward, backward = record["forward"]["ms"], record["backward"]["ms"]
    busy = [max(x[t] for t in ("matrix unit", "exponentials", "HBM")) for x in (forward, backward)]
    a_head = 1e-3 / (_KV_HEADS * _TRIANGLE)
    forward_attention, backward_attention = (
        roofline.splash(chip, _LENGTH, _HEADS, _HEAD_DIM, backward=b).seconds / (_HEADS * _TRIANGLE)
        for b in (False, True)
    )
    turns = math.ceil(_KV_HEADS / chip.cores)
    blocks = turns * _LENGTH / roofline.BLOCK
    device = Device(
        update=busy[0] * a_head,
        # Six products for every two of an update, on pairs of rows and columns of both sides.
        key_gradient=3 / 2 * busy[0] * a_head,
        backward=busy[1] * a_head,
        attention=(forward_attention, backward_attention),
        rows=roofline.BLOCK,
        programs=chip.cores,
        launch=2e-6,  # Assumed.
        chains=chip.cores,
        diagonals=(
            Diagonal(
                roofline.BLOCK,
                2e-6,  # Of starting a kernel: assumed.
                1e-3 * forward["latency"] / blocks,
                1e-3 * forward["inverses"] / (_KV_HEADS * _LENGTH),
                "after",
            ),
        ),
    )
    bandwidth, axes, slice_, between = _ICI[name]
    network = Network(
        start=3e-6,  # Assumed.
        # Slices short of a full torus lack half of the links: half the bandwidth is assumed.
        inner=Level(slice_, bandwidth / 2, 1e-6, axes),
        outer=Level(2**20, between, 50e-6, axes=0),
    )
    return Platform(name, device, network)


def platforms(names: Sequence[str]) -> tuple[Platform, ...]:
    """Those of the names."""
    return tuple(_h200() if name == "H200" else _tpu(name) for name in names)
