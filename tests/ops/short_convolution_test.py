"""The short convolution: the oracle's output and gradients, documents, and continuation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle
from ops.conformance import FIXED_TOLERANCE, assert_close, rounding, slow

from lucid_jax.ops.short_convolution import last_tokens, short_convolution

# One rounding of the products' operands is the inputs'; the sums are float32.
TOLERANCE = FIXED_TOLERANCE | {"bfloat16": FIXED_TOLERANCE["float32"]}


def draw(t, width, dtype="float64"):
    """Returns `x`, `taps`, `before` and a cotangent of two sequences, float64."""
    rng = np.random.default_rng(t + width)
    shapes = (2, t, 2, 4), (width, 2, 4), (2, width - 1, 2, 4)
    arrays = [rng.normal(size=shape) for shape in shapes]
    if dtype == "bfloat16":
        arrays = [rounding(dtype)(x) for x in arrays]
    return *arrays, rng.normal(size=shapes[0])


@pytest.mark.parametrize("dtype", ["float64", *slow("float32", "bfloat16")])
@pytest.mark.parametrize(
    ("t", "width", "documents"),
    [(11, 3, [4, 1, 2, 4]), (9, 3, None), (1, 3, None), (2, 4, [1, 1]), (5, 1, [5])],
)
def test_outputs_and_gradients_are_the_oracles(t, width, documents, dtype):
    x, taps, before, o_bar = draw(t, width, dtype)
    ids = None
    if documents:
        # Documents of one token and of two are shorter than the filter; ids may repeat.
        ids = np.stack([np.repeat([1, 2, 1, 3][: len(documents)], documents), np.ones(t, int)])
        before = np.zeros_like(before)
    expected, gradients = oracle.short_convolution(x, taps, before, o_bar, ids)
    with jax.enable_x64(dtype == "float64"):
        ids = None if ids is None else jnp.asarray(ids, jnp.int32)

        def op(x, taps, before):
            return short_convolution(x, taps, segment_ids=ids, before=before)

        o, pull_back = jax.vjp(op, *(jnp.asarray(a, dtype) for a in (x, taps, before)))
        assert o.dtype == ("float64" if dtype == "float64" else "float32")
        assert_close("o", o, expected, TOLERANCE[dtype])
        if dtype == "bfloat16":
            return  # Gradients are rounded to the dtype of their arguments.
        for name, found in zip(("x", "taps", "before"), pull_back(jnp.asarray(o_bar, o.dtype))):
            if documents and name == "before":
                continue
            assert_close(f"{name} gradient", found, gradients[name], TOLERANCE[dtype])


def test_a_sequence_goes_on_where_its_last_tokens_stand():
    x, taps, _, _ = draw(9, 3)
    x, taps = jnp.asarray(x, jnp.float32), jnp.asarray(taps, jnp.float32)
    whole = short_convolution(x, taps)
    for length in (0, 1, 2, 5):
        before = last_tokens(x, jnp.array([length, length]), 2)
        rest = short_convolution(x[:, length:], taps, before=before)
        np.testing.assert_allclose(rest, whole[:, length:], rtol=1e-6)
    uneven = last_tokens(x, jnp.array([1, 4]), 2)
    np.testing.assert_array_equal(uneven[0], jnp.stack([0 * x[0, 0], x[0, 0]]))
    np.testing.assert_array_equal(uneven[1], x[1, 2:4])
