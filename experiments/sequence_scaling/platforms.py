"""Devices and the links between them: times of kernels, bandwidths and latencies.

H200: the committed benchmark of the Triton kernels, and the results of `measure`. TPUs: the
committed roofline, which is a prediction. Links: data sheets, named beside each figure. What none
of these tells, such as the latency of a hop, is assumed.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.tpu_roofline import roofline
from lucid_jax.ops.precondition.triton_schedule import column_parts, inverse_rows

_EXPERIMENTS = pathlib.Path(__file__).parents[1]
# The shape that is read from the benchmarks.
_LENGTH, _HEADS, _KV_HEADS, _HEAD_DIM = 131072, 32, 4, 64
_SHAPE = f"1×{_LENGTH}, {_HEADS}/{_KV_HEADS}, {_HEAD_DIM}"
_MEASURED_ROWS = 4 * 32768  # Rows of all heads, whose inverses `measure` makes.
_TRIANGLE = _LENGTH**2 / 2
_BANDWIDTH = 4.8e12  # Memory bandwidth in bytes a second: NVIDIA H200 data sheet.


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """Diagonal blocks, whose inverses are made before the solve and applied in turn."""

    rows: int  # Rows of a block.
    start: float  # Seconds before the first block.
    seconds: float  # Seconds from one block's solution to the next one's.
    inverse: float  # Seconds of making the inverses, for each row of one head.
    # When products between blocks are made: "hidden", while blocks wait for each other; "after",
    # in addition; or "updates", each of a block with all blocks before it.
    products: str


@dataclasses.dataclass(frozen=True)
class Device:
    """One device. Seconds are for each row × column of one head."""

    update: float  # A product with a tile of `A`.
    key_gradient: float  # Its columns are on both sides of the diagonal.
    backward: float  # The backward pass of a solve on one device, key gradient included.
    attention: tuple[float, float]  # Causal softmax attention: forward, backward.
    rows: int  # Rows of the tile that a program of an update takes.
    programs: int  # Programs that run at once.
    launch: float  # Seconds to start an update and whatever uses its result.
    chains: int  # Heads whose chains of blocks run at once.
    # The kernel's diagonal blocks, then those that the program may choose instead.
    diagonals: tuple[Diagonal, ...]
    # Whether the Triton backend's rules apply: updates divide their columns, inverses are chosen
    # by the rows, and attention takes whole sequences of query heads.
    triton: bool = False

    def diagonal(self, stripe: int, heads: int, length: int) -> Diagonal:
        """Returns the diagonal blocks that the program chooses for stripes of so many rows."""
        measured = "NVIDIA H200", jnp.dtype(jnp.bfloat16), stripe, heads, length, _HEAD_DIM
        rows = inverse_rows(*measured) if self.triton else None
        return next((x for x in self.diagonals if x.rows == rows), self.diagonals[0])

    def updating(self, rows: np.ndarray, columns: int, heads: int, most: int) -> np.ndarray:
        """Returns the seconds of an update of so many rows by columns, for each of the heads.

        Programs run in waves, and the last wave may be nearly empty. The kernel is started for
        `most` rows; those beyond `rows` have no columns.
        """
        parts = column_parts(math.ceil(most / self.rows) * heads, columns) if self.triton else 1
        programs = np.ceil(rows / self.rows) * heads
        waves = np.ceil(programs * parts / self.programs)
        area = waves * self.programs * self.rows * math.ceil(columns / parts)
        # The sums of all parts but one are written and read in float32.
        summing = (parts - 1) * most * heads * 2 * 4 * _HEAD_DIM / _BANDWIDTH
        return np.where(rows, self.launch + area * self.update + summing, 0.0)

    def chain(self, rows: int, heads: int, diagonal: Diagonal, update: float) -> float:
        """Returns the seconds of solving rows that depend on each other."""
        turns, blocks = math.ceil(heads / self.chains), math.ceil(rows / diagonal.rows)
        chain = turns * blocks * diagonal.seconds
        if diagonal.products == "updates":
            size = np.array(diagonal.rows)
            before = (i * diagonal.rows for i in range(1, blocks))
            updates = (self.updating(size, n, heads, diagonal.rows) for n in before)
            return chain + float(sum(updates))
        products = heads * rows**2 / 2 * update
        both = max(chain, products) if diagonal.products == "hidden" else chain + products
        return diagonal.start + both


@dataclasses.dataclass(frozen=True)
class Level:
    """Links among devices, or among groups of devices."""

    size: int  # Devices or groups that they connect.
    bandwidth: float  # Bytes a second that a device receives.
    hop: float  # Seconds of one message.
    # Axes of a torus, where messages pass from neighbour to neighbour; 0 for a switch, where every
    # message of a gather doubles what a device has.
    axes: int

    def latency(self, members: int) -> float:
        """Returns the seconds until something has arrived from everyone."""
        if members == 1:
            return 0.0
        if not self.axes:
            return self.hop * math.ceil(math.log2(members))
        return self.hop * self.axes * math.ceil(members ** (1 / self.axes) / 2)


@dataclasses.dataclass(frozen=True)
class Network:
    """Links within groups of devices (a host, a slice) and between groups."""

    start: float  # Seconds to start a collective.
    inner: Level  # Links within a group.
    outer: Level  # Links between groups.

    def gather(self, size: float, members: int, stride: int) -> float:
        """Returns the seconds of an all-gather or a reduce-scatter of `size` bytes in all.

        The members are `stride` apart in the order of devices, so that a group holds fewer.
        """
        if members == 1:
            return 0.0
        near, groups, hops = self._groups(members, stride)
        # Devices receive the shards of their peers in other groups, then share them in the group.
        outer = (groups - 1) * size / members / self.outer.bandwidth
        inner = (near - 1) / near * size / self.inner.bandwidth
        return self.start + hops + outer + inner

    def exchange(self, size: float, members: int, stride: int = 1) -> float:
        """Returns the seconds of an all-to-all of `size` bytes on each device."""
        if members == 1:
            return 0.0
        near, _, hops = self._groups(members, stride)
        inner = (near - 1) / members * size / self.inner.bandwidth
        outer = (members - near) / members * size / self.outer.bandwidth
        return self.start + hops + inner + outer

    def _groups(self, members: int, stride: int) -> tuple[int, int, float]:
        """Returns the members in a group, the number of groups, and the latency."""
        near = min(members, max(1, self.inner.size // stride))
        groups = math.ceil(members / near)
        return near, groups, self.inner.latency(near) + self.outer.latency(groups)


@dataclasses.dataclass(frozen=True)
class Platform:
    """A kind of device and its network."""

    name: str
    device: Device
    network: Network


def _results(path: str) -> dict:
    return json.loads((_EXPERIMENTS / path).read_text())


def _h200() -> Platform:
    # The update's tile and the multiprocessors of an H200.
    rows, programs = 128, 132
    kernels, found = _triton_kernels(), _results("sequence_scaling/results/h200.json")
    # Seconds by kind of kernel and by size.
    small = {
        kind: {n: 1e-6 * us for n, us in x.items()} for kind, x in found["microseconds"].items()
    }
    launch = small["update"][f"{rows}×512"] - programs * rows * 512 * kernels["update"]
    device = Device(
        **kernels,
        rows=rows,
        programs=programs,
        launch=launch,
        chains=programs,
        diagonals=_diagonals(small),
        triton=True,
    )
    network = Network(
        start=8e-6,  # NCCL's: assumed.
        # NVIDIA H200 data sheet: NVLink of 900 GB/s in both directions. HGX: 8 on a switch.
        inner=Level(8, 450e9, 1e-6, axes=0),
        # NVIDIA DGX H200 data sheet: one ConnectX-7 of 400 Gb/s for every GPU.
        outer=Level(2**20, 50e9, 4e-6, axes=0),
    )
    return Platform("H200", device, network)


def _triton_kernels() -> dict[str, Any]:
    """Returns fields of a device, from times at 131072 tokens."""
    records = _results("triton_precondition/results/benchmark.json")["records"]

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
    return {
        "update": solve / pairs,
        # The transposed solve costs as much as the solve; both sides are two triangles.
        "key_gradient": (backward - solve) / (2 * pairs),
        "backward": backward / pairs,
        "attention": tuple(x / (_HEADS * _TRIANGLE) for x in (softmax[0], softmax[1] - softmax[0])),
    }


def _diagonals(small: dict[str, dict[str, float]]) -> tuple[Diagonal, ...]:
    """Returns the Triton kernel's diagonal blocks, and larger ones with explicit inverses."""
    stripe = {int(rows): seconds for rows, seconds in small["stripe"].items()}
    fewest, most = min(stripe), max(stripe)
    a_row = (stripe[most] - stripe[fewest]) / (most - fewest)
    kernel = Diagonal(64, stripe[fewest] - fewest * a_row, 64 * a_row, 0.0, "hidden")
    # The times are a library product's. The kernel reads half as much and is assumed to be as fast.
    times = ((n, small["block"][f"{n}"], small["inverses"][f"{n}"]) for n in (512, 1024, 2048))
    return kernel, *(Diagonal(n, 0.0, x, y / _MEASURED_ROWS, "updates") for n, x, y in times)


# Bytes a second that a chip receives over ICI, axes of the torus, chips of the largest slice, and
# bytes a second over the data-center network. Google Cloud's pages "TPU v5e", "TPU v5p" and
# "TPU v6e": ICI of 1600 Gb/s a chip, 1200 GB/s and 800 GB/s in both directions; DCN of 6.4 Tb/s a
# pod of 256, 50 Gb/s a chip and 25.6 Tb/s a pod of 256.
_ICI = {
    "v5e": (200e9, 2, 256, 3.1e9),
    "v5p": (600e9, 3, 6144, 6.2e9),
    "v6e": (400e9, 2, 256, 12.5e9),
}


def _tpu(name: str) -> Platform:
    records = _results("tpu_roofline/results/roofline.json")["records"]
    [record] = [x for x in records if x["chip"] == name and x["shape"] == _SHAPE]
    chip = roofline.Chip.from_name(name)
    forward, backward = record["forward"]["ms"], record["backward"]["ms"]
    busy = [max(x[t] for t in ("matrix unit", "exponentials", "HBM")) for x in (forward, backward)]
    a_head = 1e-3 / (_KV_HEADS * _TRIANGLE)
    forward_attention, backward_attention = (
        roofline.splash(chip, _LENGTH, _HEADS, _HEAD_DIM, backward=b).seconds / (_HEADS * _TRIANGLE)
        for b in (False, True)
    )
    blocks = math.ceil(_KV_HEADS / chip.cores) * _LENGTH / roofline.BLOCK
    latency = 1e-3 * forward["latency"] / blocks
    inverse = 1e-3 * forward["inverses"] / (_KV_HEADS * _LENGTH)
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
        # The time to start a kernel is assumed.
        diagonals=(Diagonal(roofline.BLOCK, 2e-6, latency, inverse, "after"),),
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
    """Returns platforms by name."""
    return tuple(_h200() if name == "H200" else _tpu(name) for name in names)
