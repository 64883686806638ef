"""The KV cache, and the attention that reads and fills it.

For each layer the cache holds the rotated keys `k` and the preconditioned values `y` (the
values `v` in a softmax layer). Cached entries never change, because `y_t = v_t − Σ_j A_tj y_j`
depends on earlier tokens only. `CachedAttention` fills the cache in three ways:

- `prefill`: the first tokens of all prompts, into an empty cache, by the ops of training;
- `prefill_chunk`: the next T tokens of all prompts, which attend to the cache and themselves;
- `step`: one new token of each sequence.

A differential layer is a softmax layer with twice the heads here (`ops/differential.py`).

Prompts are padded at the end, so no padding precedes a token. Each sequence has its own length,
and its new tokens overwrite its padding. With context parallelism the token slots of the cache
are dealt to the devices in the order of `Stripes`, as in training, so at any length all devices
read about the same amount.
"""

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.models.attention import ShardedAttention
from lucid_jax.ops.decode import (
    LayerCache,
    chunk_attention,
    decode_attention,
    decode_implementation,
)
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.parallel.mesh import Layout

# Axes of new tokens that are the same on all devices of a context-parallel group.
_Q_AXES = ("batch", None, "heads", None)
_KV_AXES = ("batch", None, "kv_heads", None)
_SHARDED_KV_AXES = ("batch", "sequence", "kv_heads", None)
# The leading axes of every array of a `LayerCache`.
_CACHE_AXES = ("batch", "kv_heads", "sequence")

# One entry for each layer.
KVCache = tuple[LayerCache, ...]


class CachedAttention:
    """Attention of a model's layers to their caches.

    `q` and `o` are `[B,T,H,D]`, `k` and `v` are `[B,T,K,D]`; `kind` and `cache` are the layer's.
    """

    def __init__(self, config: ModelConfig, layout: Layout):
        self._config, self._layout = config, layout
        self._attention = ShardedAttention(config, layout)

    def init_cache(self, batch: int, size: int) -> KVCache:
        """Returns an empty cache for `size` tokens of each sequence; call it under jit."""
        config = self._config
        slots = self._layout.stripes(size).size

        def zeros(shape, dtype):
            return self._layout.constrain(jnp.zeros(shape, dtype), *_CACHE_AXES)

        def layer(kind: str) -> LayerCache:
            dtype = config.compute_dtype
            kv_heads = config.num_kv_heads * (2 if kind == "differential" else 1)
            shape = batch, kv_heads, slots
            k, y = (zeros((*shape, config.head_dim), dtype) for _ in range(2))
            lucid = kind == "lucid"
            return LayerCache(k, y, zeros(shape, accumulator_dtype(dtype)) if lucid else None)

        return tuple(map(layer, config.layer_kinds))

    def prefill(
        self, kind: str, cache: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Computes `o` of the first T tokens and writes them to the empty cache.

        With context parallelism the tokens are in the order of `Stripes`.
        """
        y = self._attention.precondition(k, v) if kind == "lucid" else v
        o = self._attention.softmax(q, k, y, self._temperature(kind))
        axes = (_CACHE_AXES, _SHARDED_KV_AXES, _SHARDED_KV_AXES, ())
        write = self._layout.shard_map(LayerCache.with_tokens, axes, _CACHE_AXES)
        return o, write(cache, k, y, jnp.int32(0))

    def prefill_chunk(
        self,
        kind: str,
        cache: LayerCache,
        start: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Computes `o` of the T tokens at `start`, the cache's length, and writes them to it.

        Context parallelism does not support it.
        """
        assert self._layout.mesh_axis("sequence") is None
        temperature, implementation = self._temperature(kind), self._attention.implementation

        def attend(cache, start, q, k, v):
            return chunk_attention(
                q, k, v, cache, start, temperature=temperature, implementation=implementation
            )

        axes = (_CACHE_AXES, (), _Q_AXES, _KV_AXES, _KV_AXES)
        run = self._layout.shard_map(attend, axes, (_Q_AXES, _CACHE_AXES))
        return run(cache, start, q, k, v)

    def step(
        self,
        kind: str,
        cache: LayerCache,
        lengths: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Computes `o` of one token (T = 1) of each sequence and writes it to the cache.

        `lengths` is int32 `[B]`, the number of cached tokens of each sequence.
        """
        axis = self._layout.mesh_axis("sequence")
        stripes = self._layout.stripes(cache.k.shape[2])

        def attend(cache, lengths, q, k, v):
            shard_lengths = lengths
            if axis is not None:
                positions = stripes.positions(jax.lax.axis_index(axis))
                shard_lengths = jnp.sum(positions < lengths[:, None], 1, dtype=jnp.int32)
            o, cache = decode_attention(
                q[:, 0], k[:, 0], v[:, 0], cache, shard_lengths,
                temperature=self._temperature(kind), axis_name=axis,
                implementation=decode_implementation(self._attention.implementation),
            )  # fmt: skip
            return o[:, None], cache

        axes = (_CACHE_AXES, ("batch",), _Q_AXES, _KV_AXES, _KV_AXES)
        run = self._layout.shard_map(attend, axes, (_Q_AXES, _CACHE_AXES))
        return run(cache, lengths, q, k, v)

    def _temperature(self, kind: str) -> float:
        return self._config.temperature if kind == "softmax" else 1.0
