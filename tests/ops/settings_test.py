"""The ops under JAX's strictest settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.conformance import slow
from ops.interpreter import interpreted

import lucid_jax
from lucid_jax import Prefix
from lucid_jax.ops.decode import LayerCache, decode_attention
from lucid_jax.ops.precondition.gram import inverse_norms


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def draw(dtype):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 140, h, 8)), dtype) for h in (4, 2, 2)]
    return *arrays, jnp.asarray(np.sort(rng.integers(0, 3, (2, 140)), 1), jnp.int32)


@pytest.mark.parametrize("implementation", ["xla", "reference", *slow("triton", "mosaic_tpu")])
@pytest.mark.parametrize("case", ["packed bfloat16", *slow("packed float32", "one bfloat16")])
def test_nothing_is_promoted_implicitly(case, implementation):
    segments, dtype = case.split()
    packed = segments == "packed"
    q, k, v, ids = draw(dtype)
    options = {"segment_ids": ids if packed else None, "implementation": implementation}
    prefix_ids, length = (ids[:, :9] if packed else None), jnp.asarray([3, 9], jnp.int32)

    def ops(q, k, v, beta):
        prefix = Prefix(k[:, :9], v[:, :9], prefix_ids, length)
        y = lucid_jax.precondition(k, v, prefix=prefix, beta=beta, **options)
        return lucid_jax.lucid_attention(q, k, v, **options), y

    def with_gradients(*arrays):
        out, pull_back = jax.vjp(ops, *arrays)
        return out, pull_back(out)

    # Tracing or lowering raises; kernels are traced under settings of their own.
    with interpreted(implementation):
        jax.jit(with_gradients).lower(q, k, v, jax.nn.sigmoid(v[..., 0]))


@pytest.mark.parametrize("implementation", ["xla", *slow("triton")])
@pytest.mark.parametrize("lucid", [True, False])
def test_decode_promotes_nothing_implicitly(lucid, implementation):
    q, k, v, ids = draw("bfloat16")
    keys = k.swapaxes(1, 2)
    cached = LayerCache(keys, keys, inverse_norms(keys) if lucid else None)
    with interpreted(implementation):
        o, _ = decode_attention(
            q[:, 0], k[:, 1], v[:, 2], cached, ids[:, 0] + 70,
            beta=jax.nn.sigmoid(v[:, 2, :, 0]) if lucid else None, implementation=implementation,
        )  # fmt: skip
    assert np.isfinite(np.asarray(o, float)).all()
