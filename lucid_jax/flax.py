"""LUCID attention for models in Flax: an NNX module, and a function for Flax's own modules.

Import it by name, `from lucid_jax.flax import LucidAttention, attention_fn`; it needs flax.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lucid_jax.ops import rope
from lucid_jax.ops.decode import (
    LayerCache,
    chunk_attention,
    decode_attention,
    decode_implementation,
)
from lucid_jax.ops.dot_product_attention import dot_product_attention
from lucid_jax.ops.lucid_attention import lucid_attention
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.precondition import precondition

_KERNEL_INIT = nnx.initializers.lecun_normal()


class LucidAttention(nnx.Module):
    """Causal self-attention with grouped heads, RoPE and a cache.

    Args:
      num_heads: Query heads H.
      in_features: Width E of the input and the output.
      num_kv_heads: KV heads K, which divide H; None is H.
      head_dim: Head width D, even; None is E/H.
      rope_base: Base of the rotary embeddings; None leaves queries and keys as they are.
      use_bias: Whether projections have biases.
      dtype: Of the computation; None is that of the input and the parameters.
      param_dtype: Of the parameters.
      kernel_init: Initialises the projections.
      logical_axes: Whether parameters carry the logical axes "embed", "heads" and "kv_heads" as
        their `out_sharding`. Flax then wants a mesh when they are made, with
        `nnx.logical_axis_rules` for all three, and places them on it.
      implementation: As in `lucid_jax.lucid_attention`.
      rngs: Their `params` stream draws the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = 10_000.0,
        use_bias: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Callable[..., jax.Array] = _KERNEL_INIT,
        logical_axes: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        kv_heads = num_kv_heads or num_heads
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}; got {kv_heads}")
        if head_dim is None and in_features % num_heads:
            raise ValueError(
                f"without head_dim, num_heads must divide {in_features}; got {num_heads}"
            )
        self.kv_heads, self.head_dim = kv_heads, head_dim or in_features // num_heads
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE; got {self.head_dim}")
        self.rope_base, self.implementation = rope_base, implementation

        def linear(inputs, outputs, axes, bias_axes, **options):
            def metadata(names):
                return {"out_sharding": names} if logical_axes else {}

            return nnx.LinearGeneral(
                inputs, outputs, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
                kernel_init=kernel_init, rngs=rngs,
                kernel_metadata=metadata(axes), bias_metadata=metadata(bias_axes), **options,
            )  # fmt: skip

        d = self.head_dim
        kv_axes = ("embed", "kv_heads", None), ("kv_heads", None)
        self.query = linear(in_features, (num_heads, d), ("embed", "heads", None), ("heads", None))
        self.key = linear(in_features, (kv_heads, d), *kv_axes)
        self.value = linear(in_features, (kv_heads, d), *kv_axes)
        self.out = linear(
            (num_heads, d), in_features, ("heads", None, "embed"), ("embed",), axis=(-2, -1)
        )
        self.cached_key: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cached_value: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cached_inverse_norm: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cache_index: nnx.Cache[jax.Array] | None = nnx.data(None)

    def init_cache(
        self, batch: int, max_length: int, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> None:
        """Makes an empty cache for `max_length` tokens a sequence, in the computation's dtype."""
        shape = batch, self.kv_heads, max_length, self.head_dim
        self.cached_key = nnx.Cache(jnp.zeros(shape, dtype))
        self.cached_value = nnx.Cache(jnp.zeros(shape, dtype))
        norms = jnp.zeros(shape[:-1], accumulator_dtype(dtype))
        self.cached_inverse_norm = nnx.Cache(norms)
        self.cache_index = nnx.Cache(jnp.int32(0))

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decode: bool = False,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Attends within sequences or, with `decode`, to the cache, which takes the tokens up.

        Args:
          x: `[B,S,E]`; with `decode` the next tokens of all sequences, one or several.
          positions: Integers `[B,S]` for RoPE; None counts tokens, those of the cache included.
          segment_ids: Integers `[B,S]`: tokens see only tokens of the same id.
          decode: Whether `x` follows the cached tokens. All must fit into the cache.
          out_sharding: Of the result, as in `nnx.LinearGeneral`.

        Returns:
          `[B,S,E]`.

        Raises:
          ValueError: shapes that do not match, segment ids with `decode`, or no cache.
        """
        if x.ndim != 3:
            raise ValueError(f"x must have shape [B,S,E]; got {x.shape}")
        q, k, v = self.query(x), self.key(x), self.value(x)
        start = self._cached_tokens(x, segment_ids) if decode else jnp.int32(0)
        if self.rope_base is not None:
            if positions is None:
                positions = (start + jnp.arange(x.shape[1], dtype=jnp.int32))[None]
            frequencies = rope.frequencies(self.head_dim, self.rope_base, "none", 1.0, 1)
            rotations = rope.rotations(positions, frequencies)
            q, k = rope.rotate(q, *rotations), rope.rotate(k, *rotations)
        if decode:
            o = self._decode(q, k, v, start)
        else:
            o = lucid_attention(
                q, k, v, segment_ids=segment_ids, implementation=self.implementation
            )
        return self.out(o, out_sharding=out_sharding)

    def _cached_tokens(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Returns how many tokens the cache has; raises if it cannot take those of `x`."""
        if self.cached_key is None or self.cache_index is None:
            raise ValueError("decode=True needs a cache: call init_cache(batch, max_length)")
        if segment_ids is not None:
            raise ValueError("decode=True does not support segment_ids")
        batch, _, size, _ = self.cached_key.shape
        index = self.cache_index[...]
        known = 0 if isinstance(index, jax.core.Tracer) else int(index)
        if x.shape[0] != batch or known + x.shape[1] > size:
            raise ValueError(
                f"the cache has {batch} sequences of {size} tokens, {known} of them taken; got"
                f" x of shape {x.shape}"
            )
        return index

    def _decode(self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
        """Returns `o` of the tokens behind `start`, which join the cache; NaN if it is full."""
        variables: Any = self.cached_key, self.cached_value, self.cached_inverse_norm
        index: Any = self.cache_index
        cached = LayerCache(*(variable[...] for variable in variables))
        b, tokens = q.shape[:2]
        if tokens == 1:
            o, cached = decode_attention(
                q[:, 0], k[:, 0], v[:, 0], cached, jnp.broadcast_to(start, (b,)),
                implementation=decode_implementation(self.implementation),
            )  # fmt: skip
            o = o[:, None]
        else:
            o, cached = chunk_attention(q, k, v, cached, start, implementation=self.implementation)
        for variable, x in zip(variables, (cached.k, cached.y, cached.inverse_norms)):
            variable[...] = x
        index[...] = start + tokens
        return jnp.where(start + tokens > cached.k.shape[2], jnp.nan, o)


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    *,
    is_causal: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Computes LUCID attention as the `attention_fn` of Flax's modules.

        nnx.MultiHeadAttention(..., attention_fn=attention_fn)(x, is_causal=True)
        nn.MultiHeadDotProductAttention(..., attention_fn=partial(attention_fn, is_causal=True))

    Their caches hold values that are not preconditioned, so that with `decode=True` every token
    costs a solve of the whole cache; `LucidAttention` keeps preconditioned ones.

    Args:
      query: `[...,S,H,D]`, or one token of each sequence, `[...,1,H,D]`, with the `mask` of a
        cache.
      key: `[...,S,K,D]`; K divides H.
      value: `[...,S,K,D]`.
      bias: Must be None.
      mask: Broadcastable to `[...,H,S,S]`, as in `lucid_jax.dot_product_attention`: causal, alone
        or within segments and with padding, and not traced. Of one query it may be traced: the
        keys that it shows are the sequence.
      broadcast_dropout: Not read, since there is no dropout.
      dropout_rng: Not read.
      dropout_rate: Must be 0 unless `deterministic`.
      deterministic: Whether dropout is off.
      dtype: Of the computation; None is the inputs' common one.
      precision: None or `"default"`; any other counts as `"highest"`.
      module: Must be None: there are no attention weights to sow.
      force_fp32_for_softmax: Not read, since the softmax is always in float32.
      qk_attn_weights_einsum: Must be None.
      attn_weights_value_einsum: Must be None.
      is_causal: Must be True unless `mask` is causal.
      implementation: As in `lucid_jax.lucid_attention`.

    Returns:
      `[...,S,H,D]`.

    Raises:
      TypeError, ValueError: what LUCID attention does not support, by name.
    """
    del broadcast_dropout, dropout_rng, force_fp32_for_softmax
    refused = {
        "dropout": dropout_rate > 0 and not deterministic,
        "sow_weights": module is not None,
        "qk_attn_weights_einsum": qk_attn_weights_einsum is not None,
        "attn_weights_value_einsum": attn_weights_value_einsum is not None,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"LUCID attention does not support {name}")
    dtype = dtype or jnp.result_type(query, key, value)
    lead, length = query.shape[:-3], query.shape[-3]
    batch = math.prod(lead)
    q, k, v = (x.astype(dtype).reshape(batch, *x.shape[-3:]) for x in (query, key, value))
    if mask is not None:
        # Under jit an operation of jax.numpy would trace a constant.
        xp: Any = jnp if isinstance(mask, jax.core.Tracer) else np
        # Flax's masks are float32 by default.
        mask = xp.asarray(mask) != 0
        mask = mask.reshape(*[1] * (query.ndim - mask.ndim), *mask.shape)
        shape = mask.shape[-3:]
        mask = xp.broadcast_to(mask, (*lead, *shape)).reshape(batch, *shape)
    full = None if precision in (None, "default", jax.lax.Precision.DEFAULT) else "highest"
    options: dict[str, Any] = {"implementation": implementation, "precision": full}
    if length == 1 and mask is not None and bias is None:
        o = _attend_to_cache(q, k, v, mask, **options)
    else:
        o = dot_product_attention(q, k, v, bias, mask, is_causal=is_causal, **options)
    return o.reshape(query.shape)


def _attend_to_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    implementation: str | None,
    precision: str | None,
) -> jax.Array:
    """Attends with one query `[B,1,H,D]` to the keys `[B,P,K,D]` that `mask [B,H,1,P]` shows.

    A mask of the kinds that LUCID attention takes shows exactly the tokens up to the query that its
    own preconditioned value depends on, so those it hides may be another segment.
    """
    if mask.shape[1] != 1:
        raise ValueError(f"mask must be the same for all heads; got shape {mask.shape}")
    ids = jnp.broadcast_to(mask[:, 0, 0], k.shape[:2]).astype(jnp.int32)
    y = precondition(k, v, segment_ids=ids, implementation=implementation, precision=precision)
    full = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
    with full:
        o = jax.nn.dot_product_attention(q, k, y, mask=jnp.asarray(mask))
    # As in `dot_product_attention`, the result of padding is zero.
    return jnp.where(mask.any(-1)[..., None], o, 0)
