"""Inverses of large blocks are exact in float32, and in bfloat16 as accurate as small blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle
from ops.cases import draw_keys
from ops.conformance import assert_close, rounding, slow, twice_the_error
from ops.interpreter import ON_GPU

from lucid_jax.ops.precondition.block_inverses import BlockInverses
from lucid_jax.ops.precondition.gram import Keys, diagonal_inverses, normalize_keys
from lucid_jax.ops.precondition.triton_schedule import column_parts, inverse_rows
from pallas_kernels.scaling import key_scale
from pallas_kernels.triton.block_inverse import TILE, apply_inverse


@functools.partial(jax.jit, static_argnums=2)
def join(k, ids, rows: int) -> BlockInverses:
    """Joins the inverses of blocks of 128 of `k [1,S,1,D]` to those of blocks of `rows`."""
    d, ids = k.shape[-1], None if ids is None else jnp.asarray(ids)
    small = diagonal_inverses(Keys.normalize(k, ids, 128), 128)
    k_hat = (normalize_keys(k) * key_scale(d)).astype(k.dtype)
    return BlockInverses.join(Keys(jnp.swapaxes(k_hat, 1, 2), ids), small, rows, d)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_joined_inverses_invert_every_block(packed, transposed):
    rng = np.random.default_rng(0)
    k, x = rng.normal(size=(2, 1, 1024, 1, 16)).astype(np.float32)
    ids = np.repeat([[4, 2, 3]], (100, 700, 224), 1).astype(np.int32) if packed else None
    by_block = x.reshape(1, 2, 512, 1, 16).transpose(0, 3, 1, 2, 4)
    found = join(jnp.asarray(k), ids, 512).apply(by_block, transposed=transposed)
    for block, rows in enumerate((slice(0, 512), slice(512, 1024))):
        inputs = k[:, rows], x[:, rows], None if ids is None else ids[:, rows]
        expected = oracle.precondition(*inputs)
        if transposed:
            k_, x_, ids_ = inputs
            expected = oracle.precondition_gradients(k_, x_, x_, ids_)[0]["v"]
        assert_close("solution", found[:, :, block].swapaxes(1, 2), expected, 1e-5)


@pytest.mark.parametrize("keys", ["identical", *slow("cosine0.99", "random")])
@pytest.mark.parametrize("mean", [0, 4])
def test_rounding_of_one_block_does_not_add_up_in_the_next(keys, mean):
    rng, exact = np.random.default_rng(0), rounding("bfloat16")
    k = exact(draw_keys(rng, (1, 1024, 1, 64), keys))
    v = exact(rng.normal(size=k.shape) + mean)
    inverses = join(jnp.asarray(k, jnp.bfloat16), None, 512)
    a = oracle.gram(exact(oracle.normalized_keys(k)[0]), None)[0, 0]
    y = np.zeros_like(v)
    for block, rows in enumerate((slice(0, 512), slice(512, 1024))):
        left = v - np.einsum("ij,bjkd->bikd", np.tril(a, -1)[:, : rows.start], y[:, : rows.start])
        found = inverses.apply(jnp.asarray(left, jnp.bfloat16).reshape(1, 1, 2, 512, 64))
        y[:, rows] = exact(found[:, :, block].swapaxes(1, 2))
    ref, low = oracle.precondition(k, v), oracle.precondition(k, v, None, exact)
    assert_close("solution", y, ref, twice_the_error("bfloat16", low, ref))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parts", [3, *slow(1)])
def test_the_kernel_reads_one_triangle_of_one_block_and_its_remainder(parts, transposed):
    rng = np.random.default_rng(0)
    whole, x = rng.normal(size=(1, 2, 3, 256, 256)), rng.normal(size=(1, 256, 2, 20))
    rest = rng.normal(size=(1, 2, 3, 2, 128, 128))
    tile = np.arange(256) // TILE
    whole[..., tile[:, None] < tile] = np.nan
    arrays = [jnp.asarray(a, jnp.float32) for a in (whole, rest)]
    run = functools.partial(apply_inverse, parts=parts, transposed=transposed)
    shares = run(*arrays, jnp.int32(1), jnp.asarray(x, jnp.float32), interpret=not ON_GPU)
    dense = np.nan_to_num(whole[0, :, 1])
    for i in (0, 1):
        rows = slice(128 * i, 128 * (i + 1))
        dense[:, rows, rows] += rest[0, :, 1, i]
    product = "kji,bjkd->bikd" if transposed else "kij,bjkd->bikd"
    assert shares.shape == (parts, *x.shape)
    assert_close("solution", shares.sum(0), np.einsum(product, dense, x), 1e-6)


@pytest.mark.parametrize(
    ("programs", "columns", "parts"),
    [
        (2, 1024, 2), (16, 8192, 16), (256, 8192, 4),  # Few rows of one head.
        (2, 256, 1), (528, 8192, 2), (529, 8192, 1), (2048, 8192, 1),
    ],
)  # fmt: skip
def test_few_rows_split_the_columns_into_parts(programs, columns, parts):
    assert column_parts(programs, columns) == parts


@pytest.mark.parametrize(
    ("dtype", "rows", "heads", "length", "expected"),
    [
        ("float16", 8192, 1, 2**17, 2048),
        ("bfloat16", 1024, 1, 2**17, 1024),
        ("bfloat16", 512, 1, 2**17, 512),
        ("bfloat16", 256, 1, 2**17, None),  # Too few rows.
        ("bfloat16", 3 * 512, 1, 3 * 2**15, 512),
        ("bfloat16", 3 * 256, 1, 3 * 2**15, None),  # 512 does not divide the rows.
        ("bfloat16", 8192, 4, 2**17, None),  # Four heads have four times as many inverses.
        ("bfloat16", 8192, 1, 2**20, 1024),  # 2 GiB in all.
        ("float32", 8192, 1, 2**17, None),
    ],
)
def test_inverses_are_used_where_they_are_faster(dtype, rows, heads, length, expected):
    call = jnp.dtype(dtype), rows, heads, length
    assert inverse_rows("NVIDIA H200", *call, 128) == expected
    # Wider heads do not fit the kernel, and other devices are not measured.
    assert inverse_rows("NVIDIA H200", *call, 136) is None
    assert inverse_rows("NVIDIA L4", *call, 64) is None
