"""The Mosaic backend, in the TPU interpreter or on a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle
from ops.cases import CASES, Case
from ops.conformance import (
    BetaConformance,
    LucidConformance,
    PreconditionConformance,
    assert_close,
)
from ops.interpreter import ON_TPU, TPU_PARAMS

from lucid_jax import Prefix, lucid_attention, precondition
from lucid_jax.ops.precondition.api import precondition_with
from lucid_jax.ops.precondition.mosaic_tpu import MosaicTpuBackend
from pallas_kernels.mosaic_tpu.tiles import Tiles


@pytest.mark.usefixtures("mosaic_interpreter")
class TestMosaicTpu(PreconditionConformance):
    implementation = "mosaic_tpu"
    modes = (("float32", "highest"), ("bfloat16", None), ("bfloat16", "highest"))
    cases = (*CASES, Case("width_256", length=300, head_dim=256))
    quick = ("packed_identical-float32-highest",)


@pytest.mark.usefixtures("mosaic_interpreter")
class TestMosaicTpuBeta(BetaConformance):
    implementation = "mosaic_tpu"
    modes = (("float32", "highest"), ("bfloat16", None))
    quick = ("identical_keys-float32-highest",)


@pytest.mark.usefixtures("mosaic_interpreter")
class TestLucidMosaicTpu(LucidConformance):
    """Splash attention runs in its own interpreter."""

    implementation = "mosaic_tpu"
    modes = (("bfloat16", None),)
    cases = (Case("gqa_packed", length=200, heads=4, kv_heads=2, segments="packed"),)


@pytest.mark.slow
@pytest.mark.usefixtures("mosaic_interpreter")
@pytest.mark.parametrize(
    ("tiles", "segments"),
    [
        (Tiles(rows=128, columns=128), "packed"),
        (Tiles(rows=256, columns=128), "none"),
        (Tiles(rows=256, columns=256), "packed"),
    ],
    ids=str,
)
def test_every_tile_solves_the_same_system(tiles, segments):
    """Runs many steps of several tiles each, for several systems in turn."""
    drawn = Case("tiles", batch=2, length=1000, kv_heads=2, segments=segments).draw()
    k, v, y_bar = (jnp.asarray(drawn[name], jnp.float32) for name in ("k", "v", "y_bar"))
    backend = MosaicTpuBackend(tiles, interpret=TPU_PARAMS)

    @jax.jit
    def run(k, v):
        def op(k, v):
            return precondition_with(backend, k, v, drawn["segment_ids"], None)

        y, pull_back = jax.vjp(op, k, v)
        return y, *pull_back(y_bar)

    y, k_bar, v_bar = run(k, v)
    arrays = [np.asarray(x, np.float64) for x in (k, v)]
    gradients, scale = oracle.precondition_gradients(*arrays, y_bar, drawn["segment_ids"])
    assert_close("out", y, oracle.precondition(*arrays, drawn["segment_ids"]), 1e-5)
    assert_close("gradient of k", k_bar, gradients["k"], 1e-5, scale)
    assert_close("gradient of v", v_bar, gradients["v"], 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("mosaic_interpreter")
@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_through_a_split_equal_those_of_the_whole(segmented):
    rng = np.random.default_rng(0)
    k, v, cotangent = rng.normal(size=(3, 1, 400, 2, 8))
    ids = (np.arange(400) // 90).astype(np.int32)[None] if segmented else None
    cut, buffer = 250, 300
    solve = functools.partial(precondition, implementation="mosaic_tpu", precision="highest")

    def part(a, b):
        return None if ids is None else jnp.asarray(ids[:, a:b])

    @jax.jit
    def run(k, v):
        def split(k, v):
            first = solve(k[:, :cut], v[:, :cut], segment_ids=part(0, cut))
            # Tokens after `length` must not be read, not even if they are NaN.
            pad = ((0, 0), (0, buffer - cut), (0, 0), (0, 0))
            prefix_ids = None if ids is None else jnp.pad(part(0, cut), pad[:2])
            prefix = Prefix(
                jnp.pad(k[:, :cut], pad, constant_values=jnp.nan),
                jnp.pad(first, pad, constant_values=jnp.nan),
                prefix_ids,
                length=jnp.array([cut], jnp.int32),
            )
            rest = solve(k[:, cut:], v[:, cut:], segment_ids=part(cut, 400), prefix=prefix)
            return jnp.concatenate([first, rest], 1)

        y, pull_back = jax.vjp(split, k, v)
        return y, *pull_back(jnp.asarray(cotangent, y.dtype))

    y, k_bar, v_bar = run(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32))
    gradients, size = oracle.precondition_gradients(k, v, cotangent, ids)
    assert_close("out", y, oracle.precondition(k, v, ids), 1e-5)
    assert_close("gradient of k", k_bar, gradients["k"], 1e-5, size)
    assert_close("gradient of v", v_bar, gradients["v"], 1e-5)


@pytest.mark.usefixtures("mosaic_interpreter")
def test_vmap_changes_nothing():
    k, v = np.random.default_rng(0).normal(size=(2, 2, 1, 140, 1, 8)).astype(np.float32)
    solve = functools.partial(precondition, implementation="mosaic_tpu")
    mapped = jax.jit(jax.vmap(solve))(k, v)
    for i in range(2):
        assert_close(f"{i}", mapped[i], np.asarray(oracle.precondition(k[i], v[i])), 1e-5)


@pytest.mark.skipif(ON_TPU, reason="the error reports a missing TPU")
@pytest.mark.parametrize("op", [precondition, lucid_attention])
def test_mosaic_needs_a_tpu(op):
    x = jnp.ones((1, 8, 1, 16), jnp.bfloat16)
    arguments = (x, x) if op is precondition else (x, x, x)
    with pytest.raises(ValueError, match="needs a TPU; this is compiled for cpu"):
        op(*arguments, implementation="mosaic_tpu")


@pytest.mark.usefixtures("mosaic_interpreter")
def test_unsupported_inputs_are_named():
    wide = jnp.ones((1, 8, 1, 257), jnp.bfloat16)
    with pytest.raises(ValueError, match="head width of at most 256; got 257"):
        precondition(wide, wide, implementation="mosaic_tpu")
    half = jnp.ones((1, 8, 1, 16), jnp.float16)
    with pytest.raises(ValueError, match="bfloat16 or float32; got float16"):
        precondition(half, half, implementation="mosaic_tpu")


@pytest.mark.parametrize(("rows", "columns"), [(192, 64), (256, 100)])
def test_tiles_must_be_multiples_of_128(rows, columns):
    with pytest.raises(ValueError, match=f"multiples of 128; got {rows} and {columns}"):
        Tiles(rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(384, 256), (128, 256)])
def test_columns_of_a_solve_must_divide_its_rows(rows, columns):
    message = f"of a tile of lucid_.* must divide its rows; got {rows} and {columns}"
    x = jnp.ones((1, 768, 1, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=message):
        precondition_with(MosaicTpuBackend(Tiles(rows, columns), interpret=True), x, x, None, None)
