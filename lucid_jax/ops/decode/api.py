"""`decode_attention`: checks, and the choice of a backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops import check
from lucid_jax.ops.attention.api import logits_scale
from lucid_jax.ops.decode import xla
from lucid_jax.ops.precondition.gram import accumulator_dtype, inverse_norms

_BACKENDS = {"xla": xla.attend}


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cached_k: jax.Array,
    cached_y: jax.Array,
    cached_inverse_norms: jax.Array | None,
    length: jax.Array,
    *,
    temperature: float = 1.0,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """LUCID or softmax attention of one new token to a cache and to itself.

    The new key joins the query heads as one more row, so that keys and values are read once
    for both the softmax and `y = v − Σ_j A_tj y_j`. The softmax takes the keys as they are and
    `A` the normalised ones, whose exponent is `√D (k·k_j / (‖k‖‖k_j‖) − 1)`: the products of
    the same row, times a number for each cached key. That number is cached in float32. Half
    its bits would move the entry of two like keys by √D·2⁻⁹, and to take the norms from
    the keys again is another pass over them where a compiler does not fuse it into the product.

    Args:
      q: Queries `[B,H,D]`, float16, bfloat16, float32 or float64, after RoPE; K divides H.
      k: The new key `[B,K,D]` of the same dtype.
      v: The new value `[B,K,D]` of the same dtype.
      cached_k: Keys `[B,K,P,D]` of the same dtype, not normalised.
      cached_y: Preconditioned values `[B,K,P,D]`, or values for softmax attention.
      cached_inverse_norms: `1/‖k_j‖` (0 for a zero key) `[B,K,P]` in float32 (float64 for
        float64 keys), or None for softmax attention.
      length: int32 `[B]`, how many leading rows of the cache are valid. What stands behind
        must be finite, and is not read into the result.
      temperature: τ > 0 of softmax attention: its logits are `q·k/(τ√D)`.
      axis_name: Under `shard_map`, the mesh axis whose devices each hold a part of the cache,
        with the `length` of its part; the other arguments are the same along it.
      implementation: None picks the best for the device; `"xla"` runs that.

    Returns:
      `o [B,H,D]`, dtype of `q`, and the row of the new token in the cache `y [B,K,D]`, which is
      `v` for softmax attention. The cache is left to the caller.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: shapes that do not match, a temperature that is not positive, or an
        implementation that is unknown or cannot run the call.
    """
    b, h, d = check.shape("q", q, "BHD")
    check.float_dtype("q", q)
    *_, kv_heads, p, _ = check.shape("cached_k", cached_k, "BKPD")
    if h % kv_heads:
        raise ValueError(f"H must be a multiple of K; got H={h} query heads, K={kv_heads}")
    for name, x in (("k", k), ("v", v)):
        check.same(name, x, "BKD", (b, kv_heads, d), q.dtype)
    for name, x in (("cached_k", cached_k), ("cached_y", cached_y)):
        check.same(name, x, "BKPD", (b, kv_heads, p, d), q.dtype)
    dtype = accumulator_dtype(q.dtype)
    if cached_inverse_norms is not None:
        shape = b, kv_heads, p
        check.same("cached_inverse_norms", cached_inverse_norms, "BKP", shape, dtype)
    check.same("length", length, "B", (b,), jnp.int32)
    scale = logits_scale(temperature, d)
    backend = check.backend(implementation, _BACKENDS, {})
    rows = q.reshape(b, kv_heads, h // kv_heads, d)
    inverse_norm = None if cached_inverse_norms is None else inverse_norms(k)
    sums = backend(rows, k, inverse_norm, cached_k, cached_y, cached_inverse_norms, length, scale)
    if axis_name is not None:
        sums = sums.added_over(axis_name)
    logits = scale * jnp.einsum("bkgd,bkd->bkg", rows, k, preferred_element_type=dtype)
    o, y = sums.with_row(logits, v)
    return o.reshape(b, h, d).astype(q.dtype), y
