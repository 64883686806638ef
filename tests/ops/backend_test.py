"""The stripe operations of every backend agree with their dense definitions."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle
from ops.conformance import assert_close, slow
from ops.interpreter import interpreted

from lucid_jax.ops.blocks import ColumnRanges
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition.backend import choose_stripe_backend

K, D, WIDTH = 2, 20, 128
ROWS, COLUMNS = 2 * WIDTH, 4 * WIDTH
# Column ranges of the two blocks of rows: all but the last columns, and none.
FIRST, END = (0, 2 * WIDTH), (3 * WIDTH, 2 * WIDTH)


@pytest.fixture(params=["xla", *slow("triton", "triton of large stripes", "mosaic_tpu")])
def implementation(request, monkeypatch):
    name, *large = request.param.split(" of ")
    if large:
        monkeypatch.setattr(pallas_triton, "inverse_rows", lambda *_: 2 * WIDTH)
        monkeypatch.setattr(pallas_triton, "column_parts", lambda *_: 3)
    with contextlib.nullcontext() if name == "xla" else interpreted(name):
        yield name


def rectangle(k, columns, ids, column_ids, end):
    """Returns `A_rc [K,S,P]` with zeros out of range and between segments."""

    def normalized(k):
        return k / jnp.linalg.norm(k, axis=-1, keepdims=True)

    cosines = jnp.einsum("skd,pkd->ksp", normalized(k[0]), normalized(columns[0]))
    block, column = np.arange(ROWS)[:, None] // WIDTH, np.arange(COLUMNS)[None]
    visible = (np.take(FIRST, block) <= column) & (column < np.take(end, block))
    if ids is not None:
        visible &= ids[0][:, None] == column_ids[0][None]
    return jnp.where(visible, jnp.exp((cosines - 1) * D**0.5), 0)


@pytest.mark.parametrize("packed", [True, *slow(False)])
def test_stripe_operations_match_their_dense_definitions(implementation, packed):
    rng = np.random.default_rng(0)
    k, x = rng.normal(size=(2, 1, ROWS, K, D)).astype(np.float32)
    columns, x_columns = rng.normal(size=(2, 1, COLUMNS, K, D)).astype(np.float32)
    ids = column_ids = None
    if packed:
        ids, column_ids = (np.repeat([[4, 2, 3]], cuts, 1).astype(np.int32) for cuts in (
            (100, ROWS - 110, 10), (50, COLUMNS - 100, 50)))  # fmt: skip
    backend = choose_stripe_backend(implementation, jnp.asarray(k), WIDTH)

    @jax.jit
    def run(ids, column_ids, ranges):
        r, c = backend.keys(k, ids), backend.keys(columns, column_ids)
        inverses = backend.inverses(columns, column_ids, COLUMNS)
        return (
            backend.product(r, c, x_columns, ranges),
            backend.cross_gradient(k, r, x, c, x_columns, ranges),
            *(
                backend.solve_stripe(c, inverses, jnp.int32(0), x_columns, reverse=reverse)
                for reverse in (False, True)
            ),
        )

    # The ranges are traced arrays, as in the loop over stripes.
    update, k_bar, y, v_bar = run(ids, column_ids, ColumnRanges(np.int32(FIRST), np.int32(END)))

    with jax.enable_x64(True):
        exact = [jnp.asarray(a, jnp.float64) for a in (k, x, columns, x_columns)]

        def weighted(k):
            a = rectangle(k, exact[2], ids, column_ids, END)
            return -jnp.einsum("ksp,skd,pkd->", a, exact[1][0], exact[3][0])

        a = rectangle(exact[0], exact[2], ids, column_ids, END)
        expected = np.asarray(jnp.einsum("ksp,pkd->skd", a, exact[3][0]))[None]
        gradient = np.asarray(jax.grad(weighted)(exact[0]))
    assert_close("product", update, expected, 1e-5)
    assert_close("key gradient", k_bar, gradient, 1e-5)
    assert_close("solution", y, oracle.precondition(columns, x_columns, column_ids), 1e-5)
    gradients, _ = oracle.precondition_gradients(columns, x_columns, x_columns, column_ids)
    assert_close("transposed solution", v_bar, gradients["v"], 1e-5)
