"""Attention among whole rows, on one device or spread over several, as the layout says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.lucid_attention import lucid_attention, softmax_implementation
from lucid_jax.ops.precondition import precondition
from lucid_jax.ops.precondition.diagnostics import largest_off_diagonal
from lucid_jax.parallel import context_attention
from lucid_jax.parallel.mesh import Layout

_HEADS = ("batch", "sequence", "heads", None)
_KV_HEADS = ("batch", "sequence", "kv_heads", None)
_ROWS = ("batch", "sequence")


class _Ops(NamedTuple):
    """The ops of rows that are all on one device, or of rows spread over several."""

    lucid_attention: Callable[..., jax.Array]
    softmax_attention: Callable[..., jax.Array]
    precondition: Callable[..., jax.Array]
    largest_off_diagonal: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class ShardedAttention:
    """The ops of a model's layers; arrays are `[B,S,H,D]`, `[B,S,K,D]` and ids `[B,S]`.

    Where devices share a row its tokens are in the order of `Stripes`.
    """

    config: ModelConfig
    layout: Layout

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segment_ids: jax.Array | None,
        is_lucid: jax.Array,
    ) -> jax.Array:
        """`o [B,S,H,D]` of a layer of a kind that is known when it runs."""
        ops = self._ops()
        kinds: dict[str, Callable[..., jax.Array]] = {
            "lucid": functools.partial(ops.lucid_attention, implementation=self.backend),
            "softmax": functools.partial(
                ops.softmax_attention,
                implementation=softmax_implementation(self.backend),
                temperature=self.config.temperature,
            ),
        }
        branches = [f for kind, f in kinds.items() if kind in self.config.layer_kinds]

        def attend(q, k, v, segment_ids, is_lucid):
            bound = [functools.partial(f, segment_ids=segment_ids) for f in branches]
            if len(bound) == 1:
                return bound[0](q, k, v)
            return jax.lax.cond(is_lucid, *bound, q, k, v)

        return self.layout.shard_map(attend, (_HEADS, _KV_HEADS, _KV_HEADS, _ROWS, ()), _HEADS)(
            q, k, v, segment_ids, is_lucid
        )

    def precondition(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """`y [B,S,K,D]` of rows of one segment."""
        op = functools.partial(self._ops().precondition, implementation=self.backend)
        return self.layout.shard_map(op, (_KV_HEADS, _KV_HEADS), _KV_HEADS)(k, v)

    def softmax(self, q: jax.Array, k: jax.Array, v: jax.Array, temperature: float) -> jax.Array:
        """`softmax(q kᵀ/(τ√D)) v` of rows of one segment."""
        op = functools.partial(
            self._ops().softmax_attention,
            implementation=softmax_implementation(self.backend),
            temperature=temperature,
        )
        return self.layout.shard_map(op, (_HEADS, _KV_HEADS, _KV_HEADS), _HEADS)(q, k, v)

    def measure(
        self, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> dict[str, jax.Array]:
        """The telemetry of a layer, at the cost of another solve."""
        ops, axis = self._ops(), self.layout.mesh_axis("sequence")

        def norm(x):
            square = jnp.sum(jnp.square(x.astype(jnp.float32)), (1, 3))
            return jnp.sqrt(square if axis is None else jax.lax.psum(square, axis))

        def measure(k, v, segment_ids):
            if segment_ids is not None:
                # Padding is in segment 0: zeros count for nothing.
                token = (segment_ids != 0)[..., None, None]
                k, v = (jnp.where(token, x, 0) for x in (k, v))
            y = ops.precondition(k, v, segment_ids=segment_ids, implementation=self.backend)
            v_norm = norm(v)
            gain = norm(y) / jnp.where(v_norm == 0, 1, v_norm)
            return jnp.stack([ops.largest_off_diagonal(k, segment_ids=segment_ids), gain])

        measured = self.layout.shard_map(
            measure, (_KV_HEADS, _KV_HEADS, _ROWS), (None, "batch", "kv_heads")
        )(k, v, segment_ids)
        off_diagonal, gain = measured.max((1, 2))
        return {"off_diagonal": off_diagonal, "value_gain": gain}

    @property
    def backend(self) -> str | None:
        """The configured implementation, as the ops take it."""
        return None if self.config.implementation == "auto" else self.config.implementation

    def _ops(self) -> _Ops:
        axis = self.layout.mesh_axis("sequence")
        if axis is None:
            return _Ops(lucid_attention, softmax_attention, precondition, largest_off_diagonal)
        spread = (
            context_attention.lucid_attention,
            context_attention.softmax_attention,
            context_attention.precondition,
            context_attention.largest_off_diagonal,
        )
        where: dict[str, Any] = {"axis_name": axis, "stripe": self.layout.stripe}
        return _Ops(*(functools.partial(op, **where) for op in spread))
