"""Stripes do the work that the simulator of experiments/sequence_scaling counts, and no more."""

import collections
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from experiments.sequence_scaling.layouts import Counts
from experiments.sequence_scaling.program import Layer, divides_query_heads
from lucid_jax.ops.precondition import xla
from lucid_jax.parallel import context_solve
from lucid_jax.parallel.context_shard import ContextShard
from lucid_jax.parallel.stripes import Stripes


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
        shard, _ = ContextShard.from_inputs("x", width, k, k, v, None)
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
    ("heads", "kv_heads", "split", "members"),
    [(32, 4, 4, 4), (32, 4, 1, 16), (32, 4, 4, 16), (32, 8, 2, 2), (24, 4, 1, 12), (32, 4, 2, 8)],
)
def test_query_heads_are_exchanged_where_the_program_does(heads, kv_heads, split, members):
    q, k = (jax.ShapeDtypeStruct((1, 8, n // split, 64), jnp.float32) for n in (heads, kv_heads))
    shard = ContextShard("x", Stripes(8 * members, members, 8))
    layer = Layer(2**17, heads, kv_heads)
    assert divides_query_heads(layer, members, split) == shard.divides_query_heads(q, k)
