"""Powers of two of float16 values: arithmetic, bounds, and those that the solve stores."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.cases import Case
from ops.interpreter import ON_GPU

from lucid_jax.ops.precondition.triton import TritonBackend
from lucid_jax.ops.precondition.triton_schedule import Schedule
from pallas_kernels.triton import scaled
from pallas_kernels.triton.tiles import Tiles


def test_the_exponent_is_the_least_power_above_a_number():
    x = np.float32([2.0**-126, 0.75, 1, 1.5, 2, 3e38])
    expected = np.floor(np.log2(x.astype(np.float64))) + 1
    np.testing.assert_array_equal(scaled.exponent(jnp.asarray(x)), expected)
    assert scaled.exponent(jnp.float32(0)) == -126


def test_powers_are_exact_and_never_zero_or_infinite():
    e = jnp.arange(-300, 300)
    found = np.asarray(scaled.power(e), np.float64)
    np.testing.assert_array_equal(found, 2.0 ** np.clip(np.arange(-300, 300), -126, 126))


@pytest.mark.parametrize("d", [1, 2, 16, 64, 68, 128, 256])
def test_weights_of_the_key_gradient_fit_float16(d):
    """They are products of two rows of D scaled values and an entry of at most 2¹²."""
    sizes = 2.0 ** np.arange(-60, 61, 0.25)
    blocks = jnp.asarray(np.repeat(sizes[:, None, None], d, 2), jnp.float32)
    e = np.asarray(jax.vmap(functools.partial(scaled.block_exponent, d=d))(blocks))
    values = sizes * 2.0**-e
    # Later blocks of at most twice the size have the same exponent.
    assert (d * (2 * values) ** 2 * 2**12 <= 2**15).all()
    # Far from the subnormal numbers of float16, below 2⁻¹⁴.
    assert (values >= 2**-9).all()
    assert len(set(e % 4)) == 1


def test_rows_that_are_not_finite_do_not_count():
    x = jnp.ones((4, 16)).at[0, 3].set(jnp.nan).at[2, 5].set(-jnp.inf)
    assert scaled.block_exponent(x, 16) == scaled.block_exponent(jnp.ones((4, 16)), 16)


@pytest.mark.parametrize("row", [[1.0, -3, 0], [1e-30, 2e-31, 0], [0, 0, 0], [3e38, 1e30, -1]])
def test_scaled_rows_are_the_rows(row):
    values, e = scaled.scale_rows(jnp.asarray([row, row], jnp.float32))
    assert values.dtype == jnp.float16
    assert (np.abs(values) < 4).all()
    found = np.asarray(values, np.float64) * np.asarray(scaled.power(e), np.float64)
    np.testing.assert_allclose(found, np.float32([row, row]), rtol=2**-11, atol=max(row) * 2**-24)


def test_a_run_ends_before_another_exponent():
    exponents = jnp.asarray([-4, -4, 0, 0, 0, 0, 0, 8, 8])

    @jax.jit
    def find(first, end):
        return scaled.find_run(lambda i: exponents[i], first, end, exponents[8])

    for first, end in itertools.combinations(range(10), 2):
        stop, e = find(first, end)
        assert first < stop <= end
        assert (exponents[first:stop] == e).all()


@pytest.mark.slow
@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("reverse", [False, True])
def test_every_block_gets_an_exponent(reverse):
    """Also the last one, which is partial, and blocks that hold several documents."""
    case = Case("exponents", length=140, keys="cosine0.9")
    drawn, tiles = case.draw(), Tiles(64, 32, warps=4, stages=1)
    backend = TritonBackend(Schedule(tiles, tiles, tiles, tiles), interpret=not ON_GPU)
    # Documents of 70, 6, 50 and 14 rows, a thousand times as large from one to the next.
    part = np.searchsorted([70, 76, 126], np.arange(case.length), "right")
    v = jnp.asarray(drawn["v"] * 1e3 ** part[:, None, None], jnp.bfloat16)
    k, ids = jnp.asarray(drawn["k"], jnp.bfloat16), jnp.asarray(part[None], jnp.int32)
    keys, inverses = backend.operands(backend.schedule, k, ids)
    x, copy, _ = backend.solve(backend.schedule, keys, inverses, v, reverse=reverse, k=k)
    # A block has the exponent of the document that leaves it in the order of the solve.
    for block, document in enumerate(part[[0, 64, 128] if reverse else [63, 127, 139]]):
        rows = np.flatnonzero(part == document)
        rows = rows[rows >= 64 * block] if reverse else rows[rows < 64 * (block + 1)]
        e = int(copy.exponents[0, 0, block])
        assert e == scaled.block_exponent(x[0, rows, 0].astype(jnp.float32), case.head_dim), block
        own = rows[rows // 64 == block]
        np.testing.assert_allclose(
            np.asarray(copy.values[0, own, 0], np.float64) * 2.0**e,
            np.asarray(x[0, own, 0], np.float64),
            rtol=2**-8,
            atol=2.0 ** (e - 24),
        )
