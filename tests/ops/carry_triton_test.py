"""The kernels that carry vectors to every level of PaTH, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.conformance import assert_close, slow

from lucid_jax.ops.precondition.carry import Blocks, at_levels
from lucid_jax.ops.precondition.carry_triton import carry, invert_unit_lower
from lucid_jax.ops.transitions import Transitions

pytestmark = pytest.mark.usefixtures("triton_interpreter")
R = 64
# float32 keeps 24 bits, and 16 suffice for bfloat16, to which vectors are rounded.
TOLERANCES = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}


def draw(n: int, d: int, group: int) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Draws rows, columns and a tree of two KV heads."""
    rng = np.random.default_rng(n)
    b, kv_heads = 2, 2
    k, w = (rng.normal(size=(b, n * R, kv_heads, d)).astype(np.float32) for _ in range(2))
    beta = rng.uniform(0, 2, (b, n * R, kv_heads)).astype(np.float32)
    tree = Blocks.split(jnp.asarray(k), Transitions(w, beta), R, R).tree()
    rows, columns = (rng.normal(size=(b, kv_heads * group, n, R, d)) for _ in range(2))
    return jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32), tree


@pytest.mark.parametrize("dtype", ["bfloat16", *slow("float32", "float16")])
@pytest.mark.parametrize(
    ("kinds", "n", "d", "group"),
    [
        ((True, True), 5, 16, 1),
        ((True, False), 6, 16, 3),
        pytest.param((False, True), 5, 68, 1, marks=pytest.mark.slow),
        pytest.param((True, False), 3, 128, 2, marks=pytest.mark.slow),
        pytest.param((True, False), 3, 68, 2, marks=pytest.mark.slow),
        pytest.param((True, True), 1, 16, 1, marks=pytest.mark.slow),
    ],
)
def test_vectors_and_gradients_at_every_level(kinds, n, d, group, dtype):
    *vectors, tree = draw(n, d, group)
    rows, columns = (x if there else None for x, there in zip(vectors, kinds))
    exact, pull_back_exact = jax.vjp(at_levels, rows, columns, tree)
    bar = np.random.default_rng(1).normal(size=exact.shape).astype(np.float32)
    found, pull_back = carry(rows, columns, tree, jnp.dtype(dtype), 3.0)
    tolerance = TOLERANCES[dtype]
    assert_close("vectors", found[..., :d], 3 * exact.reshape(-1, *exact.shape[2:]), tolerance)
    padding = [(0, 0)] * 3 + [(0, found.shape[-1] - d)]
    # What the kernels of attention leave in the padding reaches nothing.
    padded = jnp.pad(bar.reshape(-1, *bar.shape[2:]), padding, constant_values=7)
    want = jax.tree.leaves(pull_back_exact(jnp.asarray(bar)))
    gradients = jax.tree.leaves(pull_back(padded))
    assert len(gradients) == len(want) == sum(kinds) + len(tree)
    for i, (x, y) in enumerate(zip(gradients, want)):
        assert_close(f"gradient {i}", x, y, tolerance)


@pytest.mark.parametrize("r", [64, *slow(128)])
def test_inverses_of_ill_conditioned_matrices(r):
    # All entries 1: the powers of the lower part grow like binomial coefficients.
    a = np.tril(np.ones((3, r, r), np.float32), -1)
    a[1:] *= np.random.default_rng(0).uniform(0, 1, (2, 1, r))
    exact = np.linalg.inv(np.float64(a) + np.eye(r))
    assert_close("inverse", invert_unit_lower(jnp.asarray(a + 5 * np.triu(a.mT))), exact, 1e-6)
