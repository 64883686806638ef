"""A decode step of PaTH and LUCID-PaTH in plain XLA: one pass over the cache.

The score of a new token t and a cached key j is `q_tᵀ H_t ⋯ H_{j+1} k_j`. Keys that follow every
transition would be read and written at each step. Instead they wait at the start of a window of the
last tokens, at most R, and the new query is carried back to there,
`q_tᵀ H_t ⋯ H_start = (q − (q Wᵀ) U)ᵀ`, with the W and U of the window (`precondition.carry`), which
grow by a row a token. Only the keys of the window follow each transition. So a step reads the cache
once, with twice the rows: queries carried back for the keys before the window, and queries as they
are for its keys. When the window is full, all earlier keys are carried over it, once in R steps.

In bfloat16 a key is rounded once for each window that it is carried over.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from lucid_jax.ops import check
from lucid_jax.ops.attention.api import logits_scale
from lucid_jax.ops.decode import xla
from lucid_jax.ops.decode.new_token import LayerCache, NewToken, check_step
from lucid_jax.ops.decode.partial_softmax import attend_and_append
from lucid_jax.ops.numerics import accumulator_dtype, product
from lucid_jax.ops.per_device import per_device
from lucid_jax.ops.precondition.carry import carry_to_end, full_product, unit_directions
from lucid_jax.ops.transitions import Transitions, check_transitions

# Rows of the window, R.
_WINDOW = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PathCache:
    """The cache of one layer whose keys are carried through transitions.

    Attributes:
      layer: The cache, whose keys before the window are carried to its start, and those in it to
        its end. The norms for LUCID-PaTH are those of the keys as they came.
      keys: The keys of the window `[B,K,R,D]`, carried to its end, in the accumulator dtype.
      w: Its unit directions `[B,K,R,D]`, zeros where there is no token yet.
      u: Its `U [B,K,R,D]`.
      count: int32 `[B]`, the tokens in the window, the last of the cached ones.
    """

    layer: LayerCache
    keys: jax.Array
    w: jax.Array
    u: jax.Array
    count: jax.Array

    @classmethod
    def from_tokens(cls, layer: LayerCache, k: jax.Array, transitions: Transitions) -> PathCache:
        """Makes the cache of S tokens.

        Args:
          layer: A cache that holds the tokens in its first S places, with keys as they came.
          k: The same keys `[B,S,K,D]`.
          transitions: The transitions of the tokens.

        Raises:
          TypeError: a dtype that does not match, or no Transitions.
          ValueError: shapes that do not match, or more tokens than places.
        """
        b, heads, p, d = layer.k.shape
        s = check.shape("k", k, "BSKD")[1]
        check.same("k", k, "BSKD", (b, s, heads, d), layer.k.dtype)
        check_transitions(transitions, k)
        if s > p:
            raise ValueError(f"the cache must have a place for each token; got {p} for {s}")

        def carry(layer, k, transitions):
            carried = carry_to_end(k, transitions).astype(k.dtype).swapaxes(1, 2)
            k_all = jax.lax.dynamic_update_slice_in_dim(layer.k, carried, 0, 2)
            return cls.with_empty_window(dataclasses.replace(layer, k=k_all))

        axes = _cache_axes(layer)
        in_axes = axes.layer, "BSKD", cast(Any, Transitions)("BSKD", "BSK")
        return per_device(carry, in_axes, axes, layer, k, transitions)

    @classmethod
    def with_empty_window(cls, layer: LayerCache) -> PathCache:
        """Makes the cache of tokens whose keys are carried to the end of the sequence."""
        b, heads, _, d = layer.k.shape
        empty = jnp.zeros((b, heads, _WINDOW, d), accumulator_dtype(layer.k.dtype))
        return cls(layer, empty, empty, empty, jnp.zeros(b, jnp.int32))


def _cache_axes(layer: LayerCache) -> Any:
    """Returns the axes of a `PathCache` with this layer, for `per_device`."""
    norms = None if layer.inverse_norms is None else "BKP"
    return cast(Any, PathCache)(
        cast(Any, LayerCache)("BKPD", "BKPD", norms), "BKRD", "BKRD", "BKRD", "B"
    )


@functools.partial(jax.jit, static_argnames="temperature")
def decode_path_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    transitions: Transitions,
    cached: PathCache,
    length: jax.Array,
    *,
    temperature: float = 1.0,
) -> tuple[jax.Array, PathCache]:
    """Attends with one new token of each sequence to its cache and to itself, without RoPE.

    Args:
      q: Queries `[B,H,D]`, float16, bfloat16, float32 or float64; K divides H.
      k: The new key `[B,K,D]` of the same dtype.
      v: The new value `[B,K,D]` of the same dtype.
      transitions: The new token's, `w [B,K,D]` and `beta [B,K]` of the same dtype.
      cached: The cache, with norms for LUCID-PaTH, without for PaTH attention.
      length: Integers `[B]`, the number of cached tokens, less than there are places.
      temperature: τ > 0 of the softmax, whose logits are `s/(τ√D)`.

    Returns:
      `o [B,H,D]`, dtype of `q`, and the cache with the new token.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: shapes that do not match, or a temperature that is not positive.
    """
    if not isinstance(cached, PathCache):
        raise TypeError(f"cached must be a PathCache; got {type(cached).__name__}")
    length = check_step(q, k, v, "cached.layer", cached.layer, length)
    check_transitions(transitions, k, "BKD")
    cache_axes = _cache_axes(cached.layer)
    axes = "BHD", "BKD", "BKD", cast(Any, Transitions)("BKD", "BK"), cache_axes, "B"
    scale = logits_scale(temperature, q.shape[-1]) * math.log2(math.e)
    attend = functools.partial(_attend, scale)
    return per_device(attend, axes, ("BHD", cache_axes), q, k, v, transitions, cached, length)


def _attend(scale: float, q, k, v, transitions, cached: PathCache, length):
    """`decode_path_attention` of one device, whose logits are scaled for powers of two."""
    (b, h, d), kv_heads = q.shape, k.shape[1]
    cached = _start_window(cached, length)
    start = length - cached.count
    cached = _append(cached, k, transitions)
    # The window's keys are rounded from those of the last step, not from rounded ones.
    places = start[:, None] + jnp.arange(_WINDOW)
    k_all = cached.layer.k.at[jnp.arange(b)[:, None], :, places].set(
        cached.keys.swapaxes(1, 2).astype(k.dtype), mode="drop"
    )
    before = (jnp.arange(k_all.shape[2]) < start[:, None])[:, None, None]

    def dots(rows, keys):
        wide = rows.astype(cached.w.dtype)
        reads = full_product("bkmd,bkrd->bkmr", wide, cached.w)
        back = wide - full_product("bkmr,bkrd->bkmd", reads, cached.u)
        both = jnp.concatenate([back.astype(rows.dtype), rows], 2)
        of_back, of_rows = jnp.split(product("bkmd,bkpd->bkmp", both, keys), 2, 2)
        return jnp.where(before, of_back, of_rows)

    token = NewToken(q.reshape(b, kv_heads, h // kv_heads, d), k, v, None)
    sum_up = functools.partial(xla.sum_up, token, length=length, scale=scale, dots=dots)
    layer = dataclasses.replace(cached.layer, k=k_all)
    o, layer = attend_and_append(sum_up, token, layer, length, scale)
    return o.reshape(b, h, d).astype(q.dtype), dataclasses.replace(cached, layer=layer)


def _start_window(cached: PathCache, length: jax.Array) -> PathCache:
    """Carries keys over the windows that are full, which then begin anew."""
    full = cached.count == _WINDOW

    def carry(cached):
        is_full = full[:, None, None, None]
        before = jnp.arange(cached.layer.k.shape[2]) < (length - cached.count)[:, None]
        keys = cached.layer.k.astype(cached.w.dtype)
        writes = full_product("bkpd,bkrd->bkpr", keys, cached.u)
        carried = keys - full_product("bkpr,bkrd->bkpd", writes, cached.w)
        keys = jnp.where(is_full & before[:, None, :, None], carried, keys)
        layer = dataclasses.replace(cached.layer, k=keys.astype(cached.layer.k.dtype))
        keys, w, u = (jnp.where(is_full, 0, x) for x in (cached.keys, cached.w, cached.u))
        return PathCache(layer, keys, w, u, jnp.where(full, 0, cached.count))

    return jax.lax.cond(full.any(), carry, lambda cached: cached, cached)


def _append(cached: PathCache, k: jax.Array, transitions: Transitions) -> PathCache:
    """Adds a token to the window, whose keys follow its transition."""
    w, beta = unit_directions(transitions.w), transitions.beta.astype(cached.w.dtype)[..., None]
    u = beta * (
        w - full_product("bkr,bkrd->bkd", full_product("bkd,bkrd->bkr", w, cached.w), cached.u)
    )
    along = beta * full_product("bkrd,bkd->bkr", cached.keys, w)
    keys = cached.keys - along[..., None] * w[:, :, None]
    place = jnp.arange(keys.shape[0]), slice(None), cached.count
    return dataclasses.replace(
        cached,
        keys=keys.at[place].set(k.astype(keys.dtype)),
        w=cached.w.at[place].set(w),
        u=cached.u.at[place].set(u),
        count=cached.count + 1,
    )
