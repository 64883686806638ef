"""The cache of a model: rotated keys and preconditioned values, and attention that fills it.

A row of it never changes: `y_t = v_t − Σ_j A_tj y_j` looks back only. Prompts are padded at
their ends, so that no padding stands before a token, and each row of the batch has its own
length: its next token is written over the padding. Where devices share a row (`context`), its
places are dealt to them in the order of `Stripes`, as in training, so that all have alike to
read whatever the length.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.models.attention import ShardedAttention
from lucid_jax.ops.attention.api import choose_subset_backend, logits_scale
from lucid_jax.ops.blocks import put
from lucid_jax.ops.decode import LayerCache, decode_attention
from lucid_jax.ops.precondition import Prefix, precondition
from lucid_jax.ops.precondition.gram import accumulator_dtype, inverse_norms
from lucid_jax.ops.query_positions import QueryPositions
from lucid_jax.parallel.mesh import Layout

_HEADS = ("batch", None, "heads", None)
_KV_HEADS = ("batch", None, "kv_heads", None)
_ROWS = ("batch", "sequence", "kv_heads", None)
# Of every array of a cache, up to its last axis.
_CACHE = ("batch", "kv_heads", "sequence")


# Of every layer.
Cache = tuple[LayerCache, ...]


@dataclasses.dataclass(frozen=True)
class CachedAttention:
    """Attention of a model's layers to their caches; q is `[B,T,H,D]`, k and v `[B,T,K,D]`."""

    config: ModelConfig
    layout: Layout

    def empty(self, batch: int, size: int) -> Cache:
        """For so many tokens of each row, all layers; traced under jit."""
        config = self.config
        shape = batch, config.num_kv_heads, self.layout.stripes(size).size

        def zeros(shape, dtype):
            return self.layout.constrain(jnp.zeros(shape, dtype), *_CACHE)

        def layer(kind: str) -> LayerCache:
            dtype = config.compute_dtype
            k, y = (zeros((*shape, config.head_dim), dtype) for _ in range(2))
            lucid = kind == "lucid"
            return LayerCache(k, y, zeros(shape, accumulator_dtype(dtype)) if lucid else None)

        return tuple(map(layer, config.layer_kinds))

    def start(
        self, kind: str, cache: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """`o [B,T,H,D]` of the first rows of an empty cache, and the cache with them.

        The rows are in the order of `Stripes`, and run as those of training do.
        """
        rows = ShardedAttention(self.config, self.layout)
        y = rows.precondition(k, v) if kind == "lucid" else v
        o = rows.softmax(q, k, y, self._temperature(kind))
        write = self.layout.shard_map(_write_block, (_CACHE, _ROWS, _ROWS, ()), _CACHE)
        return o, write(cache, k, y, jnp.int32(0))

    def extend(
        self,
        kind: str,
        cache: LayerCache,
        start: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """As `start`, of the rows from `start` on, after as many; no devices share a row."""
        assert self.layout.mesh_axis("sequence") is None
        implementation = ShardedAttention(self.config, self.layout).backend

        def on_one(cache, start, q, k, v):
            y = v
            if kind == "lucid":
                # By segments and not by length: tiles behind the rows are then not visited.
                solved = jnp.arange(cache.k.shape[2]) < start
                ids = jnp.broadcast_to(solved.astype(jnp.int32), (k.shape[0], solved.size))
                past = Prefix(cache.k.swapaxes(1, 2), cache.y.swapaxes(1, 2), ids)
                here = jnp.ones(k.shape[:2], jnp.int32)
                y = precondition(k, v, segment_ids=here, prefix=past, implementation=implementation)
            cache = _write_block(cache, k, y, start)
            rows = QueryPositions(start + jnp.arange(q.shape[1], dtype=jnp.int32), None, None)
            # Of some rows among others there is no dense attention, and no kernel of a solve.
            softmax = "xla" if implementation in ("reference", "xla") else None
            o, _ = choose_subset_backend(softmax, q).forward(
                logits_scale(self._temperature(kind), q.shape[-1]), None,
                q, cache.k.swapaxes(1, 2), cache.y.swapaxes(1, 2), rows,
            )  # fmt: skip
            return o, cache

        axes = (_CACHE, (), _HEADS, _KV_HEADS, _KV_HEADS)
        return self.layout.shard_map(on_one, axes, (_HEADS, _CACHE))(cache, start, q, k, v)

    def step(
        self,
        kind: str,
        cache: LayerCache,
        lengths: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """`o [B,1,H,D]` of one more token of each row, and the cache with it.

        Args:
          kind: Of the layer.
          cache: Of the layer.
          lengths: int32 `[B]`, tokens of each row before this one.
          q: `[B,1,H,D]`.
          k: `[B,1,K,D]`.
          v: `[B,1,K,D]`.
        """
        axis = self.layout.mesh_axis("sequence")
        stripes = self.layout.stripes(cache.k.shape[2])

        def on_one(cache, lengths, q, k, v):
            here = lengths
            if axis is not None:
                positions = stripes.positions(jax.lax.axis_index(axis))
                here = jnp.sum(positions < lengths[:, None], 1, dtype=jnp.int32)
            o, cache = decode_attention(
                q[:, 0], k[:, 0], v[:, 0], cache, here,
                temperature=self._temperature(kind), axis_name=axis,
                implementation=self._decode_implementation,
            )  # fmt: skip
            return o[:, None], cache

        axes = (_CACHE, ("batch",), _HEADS, _KV_HEADS, _KV_HEADS)
        return self.layout.shard_map(on_one, axes, (_HEADS, _CACHE))(cache, lengths, q, k, v)

    def _temperature(self, kind: str) -> float:
        return self.config.temperature if kind == "softmax" else 1.0

    @property
    def _decode_implementation(self) -> str | None:
        """The XLA path of a step is dense itself."""
        names = {"reference": "xla", "xla": "xla", "triton": "triton"}
        return names.get(self.config.implementation)


def _write_block(cache: LayerCache, k: jax.Array, y: jax.Array, start: jax.Array) -> LayerCache:
    """The rows `[B,T,K,D]` of a device at place `start` of its part, the same in all rows."""
    norms = cache.inverse_norms
    return LayerCache(
        put(cache.k, k.swapaxes(1, 2), start),
        put(cache.y, y.swapaxes(1, 2), start),
        None if norms is None else put(norms, inverse_norms(k).swapaxes(1, 2), start, -1),
    )
