"""The ops where JAX's integers and floats have 64 bits: the same results, in the same dtypes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.interpreter import interpreted

import lucid_jax
from lucid_jax import Prefix
from lucid_jax.ops.decode import LayerCache, decode_attention
from lucid_jax.ops.precondition.gram import inverse_norms

SLOW = pytest.mark.slow


def attend(q, k, v, ids, implementation):
    """Returns LUCID attention and a solve with a prefix, and all their gradients."""

    def ops(q, k, v):
        options = {"segment_ids": ids, "implementation": implementation}
        prefix = Prefix(k[:, :9], v[:, :9], ids[:, :9])
        y = lucid_jax.precondition(k, v, prefix=prefix, **options)
        return lucid_jax.lucid_attention(q, k, v, **options), y

    out, pull_back = jax.vjp(ops, q, k, v)
    return out, pull_back(out)


def decode(q, k, v, ids, implementation):
    q, k, v = (jnp.asarray(x).swapaxes(1, 2) for x in (q, k, v))
    cached = LayerCache(k, v, inverse_norms(k))
    length = ids[:, 0] + 70
    return decode_attention(
        q[:, :, 0], k[:, :, 1], v[:, :, 2], cached, length, implementation=implementation
    )


@pytest.mark.parametrize(
    ("op", "implementation", "dtype", "d"),
    [
        (attend, "xla", "float32", 8),
        (decode, "xla", "float32", 8),
        *(
            pytest.param(attend, name, "float32", 8, marks=SLOW)
            for name in ("reference", "triton", "mosaic_tpu")
        ),
        # Heads as wide as the kernels' tiles, and scaled float16 operands.
        pytest.param(attend, "triton", "bfloat16", 16, marks=SLOW),
        pytest.param(decode, "triton", "float32", 8, marks=SLOW),
    ],
)
def test_the_ops_do_not_depend_on_x64(op, implementation, dtype, d):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 140, h, d)), dtype) for h in (4, 2, 2)]
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 140)), 1), jnp.int32)
    kernels = implementation in ("triton", "mosaic_tpu")
    with interpreted(implementation) if kernels else contextlib.nullcontext():
        run = jax.jit(functools.partial(op, implementation=implementation))
        expected = run(*arrays, ids)
        with jax.enable_x64(True):
            found = run(*arrays, ids)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            *(np.asarray(a, np.float64) for a in (x, y)), rtol=1e-5, atol=1e-5
        )
