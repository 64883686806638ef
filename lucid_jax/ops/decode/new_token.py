"""The cache of one layer, and the token that a decode step adds to it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops import check
from lucid_jax.ops.blocks import put
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.precondition.gram import inverse_norms


class NewToken(NamedTuple):
    """The next token of each sequence: `q [B,K,G,D]`, `k` and `v [B,K,D]`, and `β [B,K]`.

    `beta` is in the accumulator dtype, or None for 1.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The KV cache of one layer: places for P tokens of each sequence.

    The softmax takes the keys as they are, `A` the normalised ones: the exponent of `A_tj` is
    `√D (k_t·k_j / (‖k_t‖‖k_j‖) − 1)`, the same product scaled by a number for each key. That
    number is kept in float32: in bfloat16 it would move the entry of two like keys by √D·2⁻⁹,
    and computing it from the keys again is another pass over them wherever a compiler does not
    fuse it into the product.

    Attributes:
      k: Rotated keys `[B,K,P,D]`, not normalised; heads first, as the products read them.
      y: Preconditioned values `[B,K,P,D]`; plain values for softmax attention.
      inverse_norms: `1/‖k‖ [B,K,P]` in the accumulator dtype, 0 for a zero key; None for softmax
        attention.
    """

    k: jax.Array
    y: jax.Array
    inverse_norms: jax.Array | None

    def with_tokens(self, k: jax.Array, y: jax.Array, start: jax.Array) -> LayerCache:
        """Writes keys and values `[B,T,K,D]` from the place `start`, int32 `[]`, on."""
        norms = self.inverse_norms
        return LayerCache(
            put(self.k, k.swapaxes(1, 2), start),
            put(self.y, y.swapaxes(1, 2), start),
            None if norms is None else put(norms, inverse_norms(k).swapaxes(1, 2), start, -1),
        )

    def with_key(self, k: jax.Array, place: jax.Array) -> LayerCache:
        """Writes a key `[B,K,D]` at the place int32 `[B]` of each sequence; P writes nowhere."""
        norms = self.inverse_norms
        if norms is not None:
            norms = _write(norms, inverse_norms(k), place)
        return LayerCache(_write(self.k, k, place), self.y, norms)

    def with_value(self, y: jax.Array, place: jax.Array) -> LayerCache:
        """Writes a value `[B,K,D]` at the place int32 `[B]` of each sequence; P writes nowhere."""
        return dataclasses.replace(self, y=_write(self.y, y, place))


def check_step(
    q: jax.Array, k: jax.Array, v: jax.Array, name: str, cached: LayerCache, length: jax.Array
) -> jax.Array:
    """Returns the length as int32; raises unless new tokens and a cache, with its name, fit.

    Shapes are those of `decode_attention`.
    """
    if not isinstance(cached, LayerCache):
        raise TypeError(f"{name} must be a LayerCache; got {type(cached).__name__}")
    b, h, d = check.shape("q", q, "BHD")
    check.float_dtype("q", q)
    _, kv_heads, p, _ = check.shape(f"{name}.k", cached.k, "BKPD")
    check.grouped_heads(h, kv_heads)
    for new, x in (("k", k), ("v", v)):
        check.same(new, x, "BKD", (b, kv_heads, d), q.dtype)
    for old, x in (("k", cached.k), ("y", cached.y)):
        check.same(f"{name}.{old}", x, "BKPD", (b, kv_heads, p, d), q.dtype)
    if (norms := cached.inverse_norms) is not None:
        dtype = accumulator_dtype(q.dtype)
        check.same(f"{name}.inverse_norms", norms, "BKP", (b, kv_heads, p), dtype)
    return check.integers("length", length, "B", (b,))


def _write(x: jax.Array, entry: jax.Array, place: jax.Array) -> jax.Array:
    at = x.at[jnp.arange(x.shape[0]), :, place]
    return at.set(entry, mode="drop", unique_indices=True, indices_are_sorted=True)
