"""The short convolution of sharded sequences: the oracle's output and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ops import oracle
from ops.conformance import FIXED_TOLERANCE, assert_close, slow
from parallel.context_attention_test import SHARDED, mesh_of

from lucid_jax.parallel.context_convolution import short_convolution
from lucid_jax.parallel.stripes import Stripes


@pytest.mark.parametrize("packed", [True, *slow(False)])
@pytest.mark.parametrize("sizes", [(3, 4, 3), *slow((2, 2, 3), (4, 5, 1))], ids=str)
def test_outputs_and_gradients_are_the_oracles(sizes, packed):
    devices, stripe, width = sizes
    rng = np.random.default_rng(0)
    length = 3 * devices * stripe
    x, o_bar = rng.normal(size=(2, 2, length, 2, 4))
    taps, before = rng.normal(size=(width, 2, 4)), np.zeros((2, width - 1, 2, 4))
    ids = np.sort(rng.integers(0, length // 3, (2, length)), 1).astype(np.int32)
    ids = ids if packed else None
    expected, gradients = oracle.short_convolution(x, taps, before, o_bar, ids)
    order = Stripes(length, devices, stripe).permutation()

    def on_one_device(x, taps, ids):
        return short_convolution(x, taps, axis_name="x", stripe=stripe, segment_ids=ids)

    op = jax.shard_map(
        on_one_device,
        mesh=mesh_of(devices),
        in_specs=(SHARDED, PartitionSpec(), SHARDED),
        out_specs=SHARDED,
    )

    @jax.jit
    def run(x, taps, o_bar):
        def whole(x, taps):
            striped = None if ids is None else ids[:, order]
            return op(x[:, order], taps, striped)[:, np.argsort(order)]

        o, pull_back = jax.vjp(whole, x, taps)
        return o, *pull_back(o_bar)

    o, x_bar, taps_bar = run(*(jnp.asarray(a, jnp.float32) for a in (x, taps, o_bar)))
    tolerance = FIXED_TOLERANCE["float32"]
    assert_close("o", o, expected, tolerance)
    assert_close("x gradient", x_bar, gradients["x"], tolerance)
    assert_close("taps gradient", taps_bar, gradients["taps"], tolerance)


def test_a_block_shorter_than_the_filter_is_refused():
    def op(x):
        return short_convolution(x, jnp.ones((3, 1, 8)), axis_name="x", stripe=1)

    run = jax.shard_map(op, mesh=mesh_of(2), in_specs=SHARDED, out_specs=SHARDED)
    with pytest.raises(ValueError, match="stripe must be at least the 2 tokens before; got 1"):
        jax.eval_shape(run, jnp.zeros((1, 8, 1, 8)))
