"""The context-parallel layer, simulated event by event on all devices.

The solve is right-looking over stripes. At step t every device does, in this order,

    first    update its rows of stripe t with the solution of stripe t−1
    gather   all-gather these rows; it begins when the last device is ready
    later    meanwhile update its rows of all later stripes with stripe t−1
    stripe   solve the gathered stripe

and then has the solution of stripe t. The gather runs beside a device's work. The backward solve is
the same from the last stripe to the first. Attention and the key gradient are one kernel each for a
device's rows and all columns, so that the slowest device counts. On GPUs an all-to-all gives every
device whole sequences of some query heads instead, where the heads divide.
"""

import dataclasses

import numpy as np

from experiments.sequence_scaling.layouts import Counts
from experiments.sequence_scaling.platforms import Platform

COMPUTE, ACCUMULATOR = 2, 4  # Bytes of bfloat16 and float32.


@dataclasses.dataclass(frozen=True)
class Layer:
    """One sequence and the heads of `lucid_1b`."""

    length: int
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """The division of a layer over C devices."""

    layout: str  # One of `layouts.LAYOUTS`.
    width: int  # Rows b of a block.
    # Devices that divide the heads by an all-to-all; C/split divide the sequence of each part.
    split: int


@dataclasses.dataclass(frozen=True)
class Path:
    """The critical path of a solve: seconds of each step that the last device waited for."""

    first: float
    gather: float
    later: float
    stripe: float

    @property
    def seconds(self) -> float:
        """Time of the solve."""
        return self.first + self.gather + self.later + self.stripe


def play(first: np.ndarray, later: np.ndarray, gather: float, stripe: float) -> Path:
    """Simulates the events of a solve, from the seconds of each event; updates are `[N,C]`."""
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
    """Seconds of one pass of a layer."""

    solve: Path  # The critical path of the solve.
    attention: float  # Softmax attention on the device with the most work.
    key_gradient: float  # The key gradient on the device with the most work.
    inverses: float  # The inverses of the diagonal blocks.
    communication: float  # Collectives outside the solve, which nothing hides.

    @property
    def seconds(self) -> float:
        """Time of the pass."""
        others = self.attention + self.key_gradient + self.inverses + self.communication
        return self.solve.seconds + others


def simulate(platform: Platform, layer: Layer, devices: int, plan: Plan) -> tuple[Pass, Pass]:
    """Returns the forward and the backward pass on C devices, with C > `plan.split`."""
    device, network = platform.device, platform.network
    members, heads = devices // plan.split, layer.kv_heads // plan.split
    counts = Counts.for_layout(plan.layout, members, layer.length, plan.width)
    # Numbers in a row of k, v, y or one of their gradients, over a device's heads.
    row = heads * layer.head_dim
    gather = network.gather(counts.stripe * row * ACCUMULATOR, members, plan.split)
    diagonal = device.diagonal(counts.stripe, heads, layer.length)
    stripe = device.chain(counts.stripe, heads, diagonal, device.update)
    # Rows for which the kernels of the two updates are started.
    held = int(counts.held.max()), int(counts.held.sum(0).max())
    solves = []
    for backward in (False, True):
        updates = zip(counts.updates(backward=backward), held)
        first, later = (device.updating(x, counts.stripe, heads, most) for x, most in updates)
        solves.append(play(first, later, gather, stripe))
    keys = network.gather(counts.length * row * COMPUTE, members, plan.split)
    sums = network.gather(counts.length * row * ACCUMULATOR, members, plan.split)
    exchange = _exchange(platform, layer, devices, plan.split)
    if device.triton and divides_query_heads(layer, members, plan.split):
        pairs = counts.length * (counts.length + 1) // 2
        attention = _attention(platform, layer, devices, pairs)
        # q and o, or their gradients.
        queries = counts.length / devices * 2 * layer.heads // plan.split * layer.head_dim
        exchange += network.exchange(queries * COMPUTE, members, plan.split)
    else:
        attention = _attention(platform, layer, plan.split, int(counts.attention.max()))
    pairs = int(counts.key_gradient().max()) * heads
    gradient = device.launch + pairs * device.key_gradient
    inverses = counts.length * heads * diagonal.inverse
    # Forward gathers k. Backward gathers k and y, and the sums of the gradients of k and y.
    communication = exchange + keys, exchange + 2 * keys + 2 * sums
    return (
        Pass(solves[0], attention[0], 0.0, inverses, communication[0]),
        Pass(solves[1], attention[1], gradient, inverses, communication[1]),
    )


def by_heads(platform: Platform, layer: Layer, devices: int) -> tuple[Pass, Pass]:
    """Returns the passes on C devices that divide the heads only."""
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


def divides_query_heads(layer: Layer, members: int, split: int) -> bool:
    """Returns whether a device gets whole sequences of query heads, as in `ContextShard`."""
    heads, kv_heads = layer.heads // split, layer.kv_heads // split
    return heads % members == 0 and members % kv_heads == 0


def _attention(platform: Platform, layer: Layer, split: int, pairs: int) -> tuple[float, float]:
    device, heads = platform.device, layer.heads // split
    forward, backward = (device.launch + heads * pairs * x for x in device.attention)
    return forward, backward


def _exchange(platform: Platform, layer: Layer, devices: int, split: int) -> float:
    """Returns the time to exchange q, k, v and o of a device's tokens, or their gradients."""
    row = 2 * (layer.heads + layer.kv_heads) * layer.head_dim * COMPUTE
    return platform.network.exchange(layer.length / devices * row, split)
