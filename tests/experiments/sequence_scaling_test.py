"""The simulator counts what the program visits, and plays its events."""

import collections
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from experiments.sequence_scaling import simulate
from experiments.sequence_scaling.layouts import LAYOUTS, Counts
from experiments.sequence_scaling.platforms import platforms
from experiments.sequence_scaling.program import Layer, divides_query_heads, play
from experiments.sequence_scaling.search import best
from lucid_jax.ops.precondition import xla
from lucid_jax.parallel import context_solve
from lucid_jax.parallel.context_shard import ContextShard
from lucid_jax.parallel.stripes import Stripes


def by_mask(layout, devices, length, width, backward):
    """Counts pairs one by one, by device: of each step's two updates `[N,C]`, and of attention."""
    stripe_rows = devices * width
    unit = 2 * stripe_rows if layout == "zigzag" else stripe_rows
    padded = -(-length // unit) * unit
    place = np.arange(padded)
    chunk = place // (padded // (2 * devices)) if layout == "zigzag" else None
    holder = {
        "contiguous": lambda: place // (padded // devices),
        "zigzag": lambda: np.where(chunk < devices, chunk, 2 * devices - 1 - chunk),
        "striped": lambda: place // width % devices,
    }[layout]()
    stripe = place // stripe_rows
    if backward:
        stripe = stripe[::-1]
    first, later = np.zeros((2, padded // stripe_rows, devices), int)
    before = stripe[None, :] < stripe[:, None]
    for i, j in zip(*np.nonzero(before)):
        target = first if stripe[i] == stripe[j] + 1 else later
        target[stripe[j] + 1, holder[i]] += 1
    causal = (place[None, :] <= place[:, None]).sum(1)
    return first, later, np.bincount(holder, causal, devices)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("devices", "length", "width"), [(4, 64, 2), (3, 50, 4), (2, 17, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_those_of_a_mask(layout, devices, length, width, backward):
    counts = Counts.for_layout(layout, devices, length, width)
    rows = counts.updates(backward=backward)
    *updates, attention = by_mask(layout, devices, length, width, backward)
    for name, found, exact in zip(("first", "later"), rows, updates):
        np.testing.assert_array_equal(found * counts.stripe, exact, name)
    np.testing.assert_array_equal(counts.attention, attention)
    assert counts.key_gradient().sum() == (len(counts.held) * counts.stripe) ** 2


@dataclasses.dataclass(frozen=True)
class RecordedBackend(xla.XlaBackend):
    """A backend that logs the products of the program."""

    log: Callable[..., None] = print

    def product(self, rows, columns, x, ranges=None):
        pairs = jnp.sum(ranges.end - ranges.first) * self.width
        jax.debug.callback(self.log, jax.lax.axis_index("x"), len(ranges.first) == 1, pairs)
        return super().product(rows, columns, x, ranges)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_program_visits_what_is_counted(backward):
    devices, length, width = 4, 128, 8
    visited = collections.defaultdict(list)

    def log(device, first, pairs):
        visited[int(device), bool(first)].append(int(pairs))

    backend = RecordedBackend(width=width, log=log)
    mesh = jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])

    def solve(k, v):
        shard = ContextShard.from_inputs("x", width, k, k, v, None)
        keys = context_solve.GatheredKeys.gather(shard, k, None)
        return context_solve.solve(shard, backend, keys, v, reverse=backward)

    x = jax.random.normal(jax.random.key(0), (1, length, 1, 4))
    specs = {"in_specs": PartitionSpec(None, "x"), "out_specs": PartitionSpec()}
    jax.block_until_ready(jax.shard_map(solve, mesh=mesh, check_vma=False, **specs)(x, x))
    jax.effects_barrier()
    counts = Counts.for_layout("striped", devices, length, width)
    for device in range(devices):
        for is_first, rows in zip((True, False), counts.updates(backward=backward)):
            expected = sorted(rows[:, device] * counts.stripe)
            assert sorted(visited[device, is_first]) == expected


@pytest.mark.parametrize(
    ("last", "seconds", "path"),
    [
        # Device 0 arrives at 33, gathered at 35, solved at 45.
        ([1, 1], 45, {"first": 2, "gather": 4, "later": 9, "stripe": 30}),
        # Device 1 arrives at 35, gathered at 37, solved at 47.
        ([1, 8], 47, {"first": 11, "gather": 6, "later": 0, "stripe": 30}),
    ],
)
def test_events_by_hand(last, seconds, path):
    # Step 0: gathered at 2, solved at 12. Step 1: device 1 comes to the gather at 15, which
    # ends at 17, while device 0 works until 22; solved at 32 and 27.
    first, later = np.array([[0.0, 0], [1, 3], last]), np.array([[0.0, 0], [9, 1], [0, 0]])
    found = play(first, later, gather=2, stripe=10)
    assert found.seconds == seconds
    assert dataclasses.asdict(found) == path


def test_one_gpu_takes_as_long_as_in_its_benchmark():
    [h200] = platforms(["H200"])
    found = best(h200, Layer(2**17), 1)
    assert found.passes[0].seconds == pytest.approx(0.177, rel=0.02)
    assert found.seconds == pytest.approx(0.655, rel=0.02)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "split", "members"),
    [(32, 4, 4, 4), (32, 4, 1, 16), (32, 4, 4, 16), (32, 8, 2, 2), (24, 4, 1, 12), (32, 4, 2, 8)],
)
def test_query_heads_are_exchanged_where_the_program_does(heads, kv_heads, split, members):
    q, k = (jax.ShapeDtypeStruct((1, 8, n // split, 64), jnp.float32) for n in (heads, kv_heads))
    shard = ContextShard("x", Stripes(8 * members, members, 8))
    layer = Layer(2**17, heads, kv_heads)
    assert divides_query_heads(layer, members, split) == shard.divides_query_heads(q, k)


@pytest.mark.parametrize("name", ["H200", "v5e", "v5p", "v6e"])
@pytest.mark.parametrize(("length", "devices"), simulate.CLAIMS)
def test_less_than_a_tenth_is_lost(name, length, devices):
    [platform] = platforms([name])
    found = best(platform, Layer(length), devices)
    assert 0 < found.lost < 0.1
    parts = found.efficiency, found.lost, found.communication, found.repeated
    assert sum(parts) == pytest.approx(1)
    assert all(-1e-9 <= x < 1 for x in parts)
