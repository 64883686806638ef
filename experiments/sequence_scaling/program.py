"""The sequence-parallel layer, played through event by event on all devices.

The solve, right-looking over stripes. At step t every device, in this order,

    first    updates its rows of stripe t with the solution of stripe t−1
    gather   sends them to everyone, and receives: it begins when the last device is there
    later    meanwhile updates its rows of all later stripes with stripe t−1
    stripe   solves the gathered stripe, or its share of the heads, which are then gathered

and has the solution of stripe t. A device does one thing at a time; the gather runs beside its
work. The backward solve is the same from the last stripe to the first. Around the solve:
keys are gathered before it; attention and the key gradient are one kernel for a device's rows
and need everyone's columns, so that the slowest device counts. On GPUs attention takes whole rows
of some query heads instead, where these go round, and then all devices have the same.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from experiments.sequence_scaling.layouts import Counts
from experiments.sequence_scaling.platforms import Platform

COMPUTE, ACCUMULATOR = 2, 4  # Bytes of bfloat16 and float32.


@dataclasses.dataclass(frozen=True)
class Layer:
    """S tokens of one row; H query and K key/value heads of width D, as `lucid_1b` has them."""

    length: int
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """How C devices share a layer.

    Attributes:
      layout: One of `layouts.LAYOUTS`.
      width: b, rows of a block.
      blocks: m, blocks of a device in a stripe.
      split: Devices among which the heads are divided, by an all-to-all; C/split devices then
        share the sequence of each part.
      shared: Devices solve a stripe's heads in shares, not each all of them.
    """

    layout: str
    width: int
    blocks: int
    split: int
    shared: bool

    def stripe(self, devices: int) -> int:
        """Rows of a stripe."""
        return devices // self.split * self.blocks * self.width


@dataclasses.dataclass(frozen=True)
class Path:
    """The critical path of a solve: seconds by what the last device to finish waited for."""

    first: float
    gather: float
    later: float
    stripe: float

    @property
    def seconds(self) -> float:
        """Of the solve."""
        return self.first + self.gather + self.later + self.stripe


def play(first: np.ndarray, later: np.ndarray, gather: float, stripe: float) -> Path:
    """Plays the events of a solve.

    Args:
      first: Seconds of a device's update of the next stripe, by step and device `[N,C]`.
      later: Those of its update of later stripes `[N,C]`.
      gather: Seconds of gathering a stripe.
      stripe: Seconds of solving it.
    """
    steps, devices = first.shape
    free = np.zeros(devices)
    slowest = np.zeros(steps, np.int64)
    waited = np.zeros((steps, devices), bool)
    for t in range(steps):
        free = free + first[t]
        slowest[t] = free.argmax()
        gathered = free[slowest[t]] + gather
        free = free + later[t]
        waited[t] = free < gathered
        free = np.maximum(free, gathered) + stripe
    spent = {"first": 0.0, "gather": 0.0, "later": 0.0, "stripe": steps * stripe}
    device = free.argmax()
    for t in reversed(range(steps)):
        if waited[t, device]:
            device = slowest[t]
            spent["gather"] += gather
        else:
            spent["later"] += later[t, device]
        spent["first"] += first[t, device]
    return Path(**{name: float(seconds) for name, seconds in spent.items()})


@dataclasses.dataclass(frozen=True)
class Pass:
    """Seconds of one pass of a layer: the solve, and what is before and after it.

    Attributes:
      solve: Its critical path.
      attention: Of the device with the most.
      key_gradient: The same.
      inverses: Of the diagonal blocks.
      communication: Collectives outside the solve; nothing hides them.
    """

    solve: Path
    attention: float
    key_gradient: float
    inverses: float
    communication: float

    @property
    def seconds(self) -> float:
        """Of all."""
        return (
            self.solve.seconds
            + self.attention
            + self.key_gradient
            + self.inverses
            + self.communication
        )


def stripe_seconds(platform: Platform, layer: Layer, devices: int, plan: Plan) -> float:
    """Solving a gathered stripe, and gathering its solution where its heads are shared."""
    members, heads = devices // plan.split, layer.kv_heads // plan.split
    rows = plan.stripe(devices)
    share = math.ceil(heads / members) if plan.shared else heads
    diagonal = platform.device.diagonal(rows, share, layer.length)
    seconds = platform.device.chain(rows, share, diagonal, platform.device.update)
    if plan.shared:
        size = rows * heads * layer.head_dim * COMPUTE
        seconds += platform.network.gather(size, members, plan.split)
    return seconds


def simulate(platform: Platform, layer: Layer, devices: int, plan: Plan) -> tuple[Pass, Pass]:
    """The forward and the backward pass on C devices, more than `plan.split`."""
    device, network = platform.device, platform.network
    members, heads = devices // plan.split, layer.kv_heads // plan.split
    counts = Counts.of(plan.layout, members, layer.length, plan.width, plan.blocks)
    # A row of k, v or y, or of one of their gradients, of a device's heads.
    row = heads * layer.head_dim
    gather = network.gather(counts.stripe * row * ACCUMULATOR, members, plan.split)
    stripe = stripe_seconds(platform, layer, devices, plan)
    # What the kernels of the two updates are started for.
    held = int(counts.held.max()), int(counts.held.sum(0).max())
    solves = []
    for backward in (False, True):
        first, later = (
            _updating(platform, rows, counts.stripe, heads, most)
            for rows, most in zip(counts.updates(backward=backward), held)
        )
        solves.append(play(*_distinct(first, later), gather, stripe))
    keys = network.gather(counts.length * row * COMPUTE, members, plan.split)
    sums = network.gather(counts.length * row * ACCUMULATOR, members, plan.split)
    exchange = _exchange(platform, layer, devices, plan.split)
    if device.triton and by_query_heads(layer, members, plan.split):
        pairs = counts.length * (counts.length + 1) // 2
        attention = _attention(platform, layer, devices, pairs)
        # Of q and o, or of their gradients.
        queries = counts.length / devices * 2 * layer.heads // plan.split * layer.head_dim
        exchange += network.exchange(queries * COMPUTE, members, plan.split)
    else:
        attention = _attention(platform, layer, plan.split, int(counts.attention.max()))
    key_gradient = int(counts.key_gradient().max()) * heads * device.key_gradient
    share = math.ceil(heads / members) if plan.shared else heads
    diagonal = device.diagonal(counts.stripe, share, layer.length)
    inverses = counts.length * share * diagonal.inverse
    # Forward: k. Backward: k and y again, and the sums of the gradients of k and y.
    return (
        Pass(solves[0], attention[0], 0.0, inverses, exchange + keys),
        Pass(
            solves[1],
            attention[1],
            device.launch + key_gradient,
            inverses,
            exchange + 2 * keys + 2 * sums,
        ),
    )


def by_heads(platform: Platform, layer: Layer, devices: int) -> tuple[Pass, Pass]:
    """The passes on C devices that share the heads alone; on one device, all of it."""
    device, heads = platform.device, layer.kv_heads // devices
    diagonal = device.diagonals[0]
    exchange = _exchange(platform, layer, devices, devices)
    attention = _attention(platform, layer, devices, layer.length * (layer.length + 1) // 2)
    inverses = layer.length * heads * diagonal.inverse
    forward, backward = (
        Path(0.0, 0.0, 0.0, device.chain(layer.length, heads, diagonal, update))
        for update in (device.update, device.backward)
    )
    return (
        Pass(forward, attention[0], 0.0, inverses, exchange),
        Pass(backward, attention[1], 0.0, inverses, exchange),
    )


def by_query_heads(layer: Layer, members: int, split: int) -> bool:
    """As `ContextShard.by_query_heads`: whole rows of query heads that read one key head."""
    heads, kv_heads = layer.heads // split, layer.kv_heads // split
    return heads % members == 0 and members % kv_heads == 0


def _attention(platform: Platform, layer: Layer, split: int, pairs: int) -> tuple[float, float]:
    device, heads = platform.device, layer.heads // split
    forward, backward = (device.launch + heads * pairs * x for x in device.attention)
    return forward, backward


def _exchange(platform: Platform, layer: Layer, devices: int, split: int) -> float:
    """Of q, k, v and o of a device's tokens, or of their gradients."""
    row = 2 * (layer.heads + layer.kv_heads) * layer.head_dim * COMPUTE
    return platform.network.exchange(layer.length / devices * row, split)


def _updating(
    platform: Platform, rows: np.ndarray, columns: int, heads: int, most: int
) -> np.ndarray:
    distinct, where = np.unique(rows, return_inverse=True)
    seconds = [platform.device.updating(int(x), columns, heads, most) for x in distinct]
    return np.array(seconds)[where].reshape(rows.shape)


def _distinct(first: np.ndarray, later: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One device for all that do the same at every step: under the striped layout all do."""
    if (first == first[:, :1]).all() and (later == later[:, :1]).all():
        return first[:, :1], later[:, :1]
    return first, later
