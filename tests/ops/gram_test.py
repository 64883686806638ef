"""Key normalisation and the batched inverses shared by the backends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from ops import oracle
from ops.cases import Case
from ops.conformance import slow

from lucid_jax.ops.precondition.gram import (
    Keys,
    diagonal_inverses,
    invert_unit_lower,
    normalize_keys,
)


@pytest.mark.parametrize("size", [1, 128, *slow(5, 16, 24)])
@pytest.mark.parametrize("batch", [(2, 3), *slow(())], ids=str)
def test_inverses_agree_with_substitution(size, batch):
    rng = np.random.default_rng(size)
    a = np.tril(rng.uniform(0, 1, (*batch, size, size)) / size**0.5, -1) + np.eye(size)
    with jax.enable_x64(True):
        # Entries on and above the diagonal are not read.
        inverse = np.asarray(invert_unit_lower(jnp.asarray(a + np.triu(np.full_like(a, 9.0)))))
    for index in np.ndindex(batch):
        expected = scipy.linalg.solve_triangular(a[index], np.eye(size), lower=True)
        np.testing.assert_allclose(inverse[index], expected, atol=1e-12)
        np.testing.assert_array_equal(np.triu(inverse[index], 1), 0)
        np.testing.assert_array_equal(np.diagonal(inverse[index]), 1)


@pytest.mark.parametrize("keys", ["identical", *slow("cosine0.99", "random", "zeros")])
def test_the_norm_of_diagonal_inverses_is_at_most_two_for_any_keys(keys):
    drawn = Case(keys, batch=2, length=384, kv_heads=3, head_dim=64, keys=keys).draw()
    k_hat, _ = oracle.normalized_keys(drawn["k"])
    ids = np.repeat(np.array([0, 1, 1, 2, 5, 5], np.int32), 64)[None].repeat(2, 0)
    inverses = diagonal_inverses(
        Keys(jnp.asarray(k_hat.swapaxes(1, 2), jnp.float32), jnp.asarray(ids)),
        128,
        jax.lax.Precision.HIGHEST,
    )
    a = oracle.gram(k_hat, ids)
    for n in range(3):
        rows = slice(128 * n, 128 * (n + 1))
        expected = np.linalg.inv(a[:, :, rows, rows])
        np.testing.assert_allclose(inverses[:, :, n], expected, atol=1e-5)
        assert np.linalg.norm(inverses[:, :, n], 2, axis=(-2, -1)).max() <= 2 + 1e-5


def test_zero_keys_stay_zero_and_get_no_gradient():
    k = jnp.zeros((1, 3, 1, 4)).at[0, 1].set(1.0)
    k_hat, pull_back = jax.vjp(normalize_keys, k)
    np.testing.assert_allclose(k_hat[0, :, 0], [[0] * 4, [1] * 4, [0] * 4])
    (k_bar,) = pull_back(jnp.ones_like(k_hat).at[..., 0].set(2.0))
    np.testing.assert_array_equal(k_bar[0, ::2], 0)
    assert np.abs(k_bar[0, 1]).max() > 0


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_keys_of_any_size_are_normalised(dtype, constant):
    """A power of two in a key changes neither its direction nor, but for that power, its gradient.

    The entries of the first key are the smallest normal numbers, those of the last the largest.
    The compiler must not simplify that away, least of all where it knows the keys.
    """
    limits, rng = jnp.finfo(dtype), np.random.default_rng(0)
    bits = limits.maxexp
    exponents = [2 - bits, 8 - bits, -bits // 3, -bits // 3 + 4, 0, bits // 3, bits - 8, bits - 2]
    with jax.enable_x64(dtype == "float64"):
        k = jnp.asarray(rng.integers(1, 4, 16) * rng.choice([-1, 1], 16), dtype)
        scaled = jnp.asarray(
            np.stack([np.ldexp(np.asarray(k, float), e) for e in exponents]), dtype
        )

        def run(scaled, k_hat_bar):
            k_hat, pull_back = jax.vjp(normalize_keys, scaled)
            return k_hat, *pull_back(jnp.broadcast_to(k_hat_bar, k_hat.shape))

        k_hat_bar = jnp.asarray(rng.normal(size=16), jnp.promote_types(dtype, jnp.float32))
        if constant:
            k_hat, k_bar = jax.jit(functools.partial(run, scaled))(k_hat_bar)
        else:
            k_hat, k_bar = jax.jit(run)(scaled, k_hat_bar)
        expected, expected_pull_back = jax.vjp(normalize_keys, k)
        tolerance = 4 * float(jnp.finfo(expected.dtype).eps)
        for row in k_hat:
            np.testing.assert_allclose(row, expected, rtol=tolerance)
        np.testing.assert_allclose(
            np.linalg.norm(np.asarray(expected, float)), 16**0.5, rtol=tolerance
        )
        (expected_bar,) = expected_pull_back(k_hat_bar)
        # The gradients of the first are next to infinity, and those of the last are subnormal.
        for row, e in list(zip(k_bar, exponents))[1:-1]:
            np.testing.assert_allclose(
                np.ldexp(np.asarray(row, float), e), np.asarray(expected_bar, float),
                rtol=2 * float(limits.eps), atol=1e-6,
            )  # fmt: skip


def test_subnormal_keys_count_as_zero_or_are_normalised():
    """CPUs and TPUs read subnormal numbers as zero, GPUs do not."""
    k = jnp.asarray(np.ldexp([[3.0, -1, 2, 1]], -140), jnp.float32)
    k_hat, one = normalize_keys(k), normalize_keys(jnp.asarray([[3.0, -1, 2, 1]], jnp.float32))
    assert not np.any(k_hat) or np.allclose(k_hat, one, rtol=1e-6)
