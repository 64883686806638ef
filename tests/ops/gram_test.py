"""Key normalisation and the batched inverses shared by the backends."""

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
