"""Differential attention (Ye et al., "Differential Transformer", arXiv 2410.05258).

A pair of heads of width D has two softmax maps over values of width 2D:

    o = (1 − λ₀)·RMSNorm((softmax(q₁ k₁ᵀ/√D) − λ·softmax(q₂ k₂ᵀ/√D)) [v₁ v₂])
    λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ₀
    λ₀ = 0.8 − 0.6·exp(−0.3·l) for layer l, from 0

Heads 2p and 2p+1 are pair p, of the queries as of the keys and values, and query pair p reads
key/value pair `p // (H/K)`. Softmax attention has values as wide as its keys, so `expand` gives
each map a head for either half of the values, and any softmax attention computes the 2H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.norm import rms_norm


class Mixing(NamedTuple):
    """The parameters of a layer that combine its maps.

    Attributes:
      weight: `λ − λ₀`, float32 `[]`.
      scale: Of the RMSNorm, float32 `[2D]`.
    """

    weight: jax.Array
    scale: jax.Array


def learnt_weight(q1: jax.Array, k1: jax.Array, q2: jax.Array, k2: jax.Array) -> jax.Array:
    """Returns `λ − λ₀` from the four float32 vectors `[D]`."""
    return jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2))


def expand(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the arguments of the softmax attention that computes both maps of every pair.

    Args:
      q: `[B,T,H,D]`.
      k: `[B,S,K,D]`, K even; K divides H.
      v: `[B,S,K,D]`.

    Returns:
      Queries `[B,T,2H,D]`, keys and values `[B,S,2K,D]`. Key/value heads are ordered by pair, half
      of the values, and map.
    """
    (b, t, h, d), (s, kv_heads) = q.shape, k.shape[1:3]
    pairs, group = kv_heads // 2, h // kv_heads
    # Axes: pair of KV heads, half of the values, map, query pair.
    q = q.reshape(b, t, pairs, 1, group, 2, d).swapaxes(4, 5)
    q = jnp.broadcast_to(q, (b, t, pairs, 2, 2, group, d))
    k = jnp.broadcast_to(k.reshape(b, s, pairs, 1, 2, d), (b, s, pairs, 2, 2, d))
    v = jnp.broadcast_to(v.reshape(b, s, pairs, 2, 1, d), (b, s, pairs, 2, 2, d))
    k, v = (x.reshape(b, s, 2 * kv_heads, d) for x in (k, v))
    return q.reshape(b, t, 2 * h, d), k, v


def combine(
    o: jax.Array, mixing: Mixing, layer: int | jax.Array, kv_heads: int, eps: float
) -> jax.Array:
    """Subtracts the maps of every pair, and normalises, in float32.

    Args:
      o: `[B,T,2H,D]`, the attention of `expand`.
      layer: Index of the layer, from 0, on which λ₀ depends.
      kv_heads: K.
      eps: Of the RMSNorm.

    Returns:
      `[B,T,H,D]`, dtype of `o`: heads 2p and 2p+1 are the halves of pair p.
    """
    b, t, heads, d = o.shape
    first_weight = 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(layer, jnp.float32))
    maps = o.astype(jnp.float32).reshape(b, t, kv_heads // 2, 2, 2, -1, d)
    difference = maps[:, :, :, :, 0] - (mixing.weight + first_weight) * maps[:, :, :, :, 1]
    difference = difference.swapaxes(3, 4).reshape(b, t, heads // 4, 2 * d)
    normed = rms_norm(difference, mixing.scale * (1 - first_weight), eps)
    return normed.reshape(b, t, heads // 2, d).astype(o.dtype)
