"""The KV cache, and the attention that reads and fills it.

For each layer the cache holds the rotated keys `k` and the preconditioned values `y` (the
values `v` in a softmax layer). Cached entries never change, because `y_t = v_t − Σ_j A_tj y_j`
depends on earlier tokens only; the keys of a PaTH model alone do, because they follow the
transitions of later tokens (`PathLayerCache`). `CachedAttention` fills the cache in three ways:

- `prefill`: the first tokens of all prompts, into an empty cache, by the ops of training;
- `prefill_chunk`: the next T tokens of all prompts, which attend to the cache and themselves,
  not for PaTH;
- `step`: one new token of each sequence.

A differential layer is a softmax layer with twice the heads here (`ops/differential.py`).

Prompts are padded at the end, so no padding precedes a token. Each sequence has its own length,
and its new tokens overwrite its padding. With context parallelism the token slots of the cache
are dealt to the devices in the order of `Stripes`, as in training, so at any length all devices
read about the same amount.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.models.attention import ShardedAttention
from lucid_jax.models.inputs import CONVOLUTION_WIDTH, Inputs
from lucid_jax.ops.decode import (
    LayerCache,
    PathCache,
    chunk_attention,
    decode_attention,
    decode_implementation,
    decode_path_attention,
)
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.short_convolution import last_tokens
from lucid_jax.ops.transitions import Transitions
from lucid_jax.parallel.mesh import Layout

# Axes of new tokens that are the same on all devices of a context-parallel group.
_Q_AXES = ("batch", None, "heads", None)
_KV_AXES = ("batch", None, "kv_heads", None)
_GATE_AXES = ("batch", None, "kv_heads")
_SHARDED_KV_AXES = ("batch", "sequence", "kv_heads", None)
# The leading axes of every array of a `LayerCache`.
_CACHE_AXES = ("batch", "kv_heads", "sequence")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PathLayerCache:
    """The cache of one layer of a PaTH model.

    Attributes:
      path: The cache that a decode step reads.
      projected: The last projections that the convolution of directions reads, `[B,W−1,K,D]`;
        zeros before the first token.
    """

    path: PathCache
    projected: jax.Array

    @classmethod
    def from_prompts(
        cls,
        layer: LayerCache,
        k: jax.Array,
        y: jax.Array,
        transitions: Transitions,
        projected: jax.Array,
        lengths: jax.Array,
    ) -> PathLayerCache:
        """Makes the cache of prompts, padded at the end.

        Args:
          layer: An empty cache.
          k: Keys `[B,T,K,D]`.
          y: Preconditioned values `[B,T,K,D]`.
          transitions: The transitions of the tokens.
          projected: The projections `[B,T,K,D]` that the convolution read.
          lengths: int32 `[B]`, the tokens of each prompt.
        """
        is_token = jnp.arange(k.shape[1]) < lengths[:, None]
        # A zero direction is the identity: the keys of a prompt are carried to its own end.
        w = jnp.where(is_token[..., None, None], transitions.w, 0)
        layer = layer.with_tokens(k, y, jnp.int32(0))
        path = PathCache.from_tokens(layer, k, transitions._replace(w=w))
        return cls(path, last_tokens(projected, lengths, CONVOLUTION_WIDTH - 1))


# The axes of the arrays of a `PathCache`; no sequence is sharded.
_PATH_AXES = cast(Any, PathCache)(_CACHE_AXES, *[("batch", "kv_heads", None, None)] * 3, ("batch",))
AnyLayerCache = LayerCache | PathLayerCache
# One entry for each layer.
KVCache = tuple[AnyLayerCache, ...]


class CachedAttention:
    """Attention of a model's layers to their caches.

    `o` is `[B,T,H,D]`; `kind` and `cache` are the layer's.
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

        def layer(kind: str) -> AnyLayerCache:
            dtype = config.compute_dtype
            kv_heads = config.num_kv_heads * (2 if kind == "differential" else 1)
            shape = batch, kv_heads, slots
            k, y = (zeros((*shape, config.head_dim), dtype) for _ in range(2))
            norms = zeros(shape, accumulator_dtype(dtype)) if kind == "lucid" else None
            cache = LayerCache(k, y, norms)
            if config.positions != "path":
                return cache
            earlier = batch, CONVOLUTION_WIDTH - 1, kv_heads, config.head_dim
            return PathLayerCache(PathCache.with_empty_window(cache), jnp.zeros(earlier, dtype))

        return tuple(map(layer, config.layer_kinds))

    def prefill(
        self,
        kind: str,
        cache: AnyLayerCache,
        lengths: jax.Array,
        inputs: Inputs,
    ) -> tuple[jax.Array, AnyLayerCache]:
        """Computes `o` of the first T tokens and writes them to the empty cache.

        `lengths` is int32 `[B]`, the number of tokens of each prompt. With context parallelism the
        tokens are in the order of `Stripes`.
        """
        q, k, v, _, beta, directions = inputs
        transitions = None if directions is None else directions.transitions()
        y = self._attention.precondition(k, v, beta, transitions) if kind == "lucid" else v
        o = self._attention.softmax(q, k, y, transitions, self._temperature(kind))
        if isinstance(cache, LayerCache):
            axes = (_CACHE_AXES, _SHARDED_KV_AXES, _SHARDED_KV_AXES, ())
            write = self._layout.shard_map(LayerCache.with_tokens, axes, _CACHE_AXES)
            return o, write(cache, k, y, jnp.int32(0))
        assert directions is not None
        make = self._layout.shard_map(
            PathLayerCache.from_prompts,
            (_CACHE_AXES, _KV_AXES, _KV_AXES, _GATE_AXES, _KV_AXES, ("batch",)),
            cast(Any, PathLayerCache)(_PATH_AXES, _KV_AXES),
        )
        return o, make(cache.path.layer, k, y, transitions, directions.projected, lengths)

    def prefill_chunk(
        self, kind: str, cache: AnyLayerCache, start: jax.Array, inputs: Inputs
    ) -> tuple[jax.Array, AnyLayerCache]:
        """Computes `o` of the T tokens at `start`, the cache's length, and writes them to it.

        Neither context parallelism nor PaTH supports it.
        """
        assert self._layout.mesh_axis("sequence") is None
        assert isinstance(cache, LayerCache)
        temperature, implementation = self._temperature(kind), self._attention.implementation

        def attend(cache, start, q, k, v, beta):
            return chunk_attention(
                q, k, v, cache, start,
                beta=beta, temperature=temperature, implementation=implementation,
            )  # fmt: skip

        axes = (_CACHE_AXES, (), _Q_AXES, _KV_AXES, _KV_AXES, _GATE_AXES)
        run = self._layout.shard_map(attend, axes, (_Q_AXES, _CACHE_AXES))
        return run(cache, start, inputs.q, inputs.k, inputs.v, self._beta(kind, inputs))

    def step(
        self,
        kind: str,
        cache: AnyLayerCache,
        lengths: jax.Array,
        inputs: Inputs,
    ) -> tuple[jax.Array, AnyLayerCache]:
        """Computes `o` of one token (T = 1) of each sequence and writes it to the cache.

        `lengths` is int32 `[B]`, the number of cached tokens of each sequence.
        """
        if isinstance(cache, PathLayerCache):
            return self._path_step(kind, cache, lengths, inputs)
        axis = self._layout.mesh_axis("sequence")
        stripes = self._layout.stripes(cache.k.shape[2])

        def attend(cache, lengths, q, k, v, beta):
            shard_lengths = lengths
            if axis is not None:
                positions = stripes.positions(jax.lax.axis_index(axis))
                shard_lengths = jnp.sum(positions < lengths[:, None], 1, dtype=jnp.int32)
            o, cache = decode_attention(
                q[:, 0], k[:, 0], v[:, 0], cache, shard_lengths,
                beta=None if beta is None else beta[:, 0],
                temperature=self._temperature(kind), axis_name=axis,
                implementation=decode_implementation(self._attention.implementation),
            )  # fmt: skip
            return o[:, None], cache

        axes = (_CACHE_AXES, ("batch",), _Q_AXES, _KV_AXES, _KV_AXES, _GATE_AXES)
        run = self._layout.shard_map(attend, axes, (_Q_AXES, _CACHE_AXES))
        return run(cache, lengths, inputs.q, inputs.k, inputs.v, self._beta(kind, inputs))

    def _path_step(
        self, kind: str, cache: PathLayerCache, lengths: jax.Array, inputs: Inputs
    ) -> tuple[jax.Array, PathLayerCache]:
        directions = inputs.directions
        assert directions is not None
        transitions = directions.transitions(before=cache.projected)

        def attend(path, lengths, *tokens):
            q, k, v, transitions = jax.tree.map(lambda x: x[:, 0], tokens)
            o, path = decode_path_attention(
                q, k, v, transitions, path, lengths, temperature=self._temperature(kind)
            )
            return o[:, None], path

        axes = (_PATH_AXES, ("batch",), _Q_AXES, _KV_AXES, _KV_AXES, _GATE_AXES)
        run = self._layout.shard_map(attend, axes, (_Q_AXES, _PATH_AXES))
        o, path = run(cache.path, lengths, inputs.q, inputs.k, inputs.v, transitions)
        projected = jnp.concatenate([cache.projected[:, 1:], directions.projected], 1)
        return o, PathLayerCache(path, projected)

    def _beta(self, kind: str, inputs: Inputs) -> jax.Array | None:
        return inputs.beta if kind == "lucid" else None

    def _temperature(self, kind: str) -> float:
        return self._config.temperature if kind == "softmax" else 1.0
