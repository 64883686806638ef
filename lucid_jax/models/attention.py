"""Attention over whole sequences, on one device or with context parallelism."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.lucid_attention import lucid_attention, softmax_implementation
from lucid_jax.ops.precondition import precondition
from lucid_jax.ops.precondition.diagnostics import largest_off_diagonal
from lucid_jax.parallel import context_attention
from lucid_jax.parallel.mesh import Layout

_Q_AXES = ("batch", "sequence", "heads", None)
_KV_AXES = ("batch", "sequence", "kv_heads", None)
_TOKEN_AXES = ("batch", "sequence")

# The context-parallel form of each op.
_CONTEXT_PARALLEL: dict[Callable[..., jax.Array], Callable[..., jax.Array]] = {
    lucid_attention: context_attention.lucid_attention,
    softmax_attention: context_attention.softmax_attention,
    precondition: context_attention.precondition,
    largest_off_diagonal: context_attention.largest_off_diagonal,
}


@dataclasses.dataclass(frozen=True)
class ShardedAttention:
    """The attention ops of a model's layers on its mesh.

    `q` and `o` are `[B,S,H,D]`, `k`, `v` and `y` are `[B,S,K,D]`, segment ids are `[B,S]`. With
    context parallelism the tokens are in the order of `Stripes`.
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
        """Computes `o` of a layer, whose kind `is_lucid` (a bool scalar) may be traced."""
        ops: dict[str, Callable[..., jax.Array]] = {
            "lucid": self._op(lucid_attention, implementation=self.implementation),
            "softmax": self._softmax_op(self.config.temperature),
        }
        branches = [op for kind, op in ops.items() if kind in self.config.layer_kinds]

        def attend(q, k, v, segment_ids, is_lucid):
            bound = [functools.partial(op, segment_ids=segment_ids) for op in branches]
            if len(bound) == 1:
                return bound[0](q, k, v)
            return jax.lax.cond(is_lucid, *bound, q, k, v)

        in_axes = (_Q_AXES, _KV_AXES, _KV_AXES, _TOKEN_AXES, ())
        return self.layout.shard_map(attend, in_axes, _Q_AXES)(q, k, v, segment_ids, is_lucid)

    def precondition(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """Computes `y`; each sequence is one segment."""
        op = self._op(precondition, implementation=self.implementation)
        return self.layout.shard_map(op, (_KV_AXES, _KV_AXES), _KV_AXES)(k, v)

    def softmax(self, q: jax.Array, k: jax.Array, v: jax.Array, temperature: float) -> jax.Array:
        """Computes `softmax(q kᵀ/(τ√D)) v`; each sequence is one segment."""
        op = self._softmax_op(temperature)
        return self.layout.shard_map(op, (_Q_AXES, _KV_AXES, _KV_AXES), _Q_AXES)(q, k, v)

    def measure(
        self, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Returns a layer's telemetry (see `Transformer`), at the cost of another solve."""
        axis = self.layout.mesh_axis("sequence")

        def head_norms(x):
            square = jnp.sum(jnp.square(x.astype(jnp.float32)), (1, 3))
            return jnp.sqrt(square if axis is None else jax.lax.psum(square, axis))

        def measure(k, v, segment_ids):
            if segment_ids is not None:
                # Segment 0 is padding; zeroed, it adds nothing to either value.
                is_token = (segment_ids != 0)[..., None, None]
                k, v = (jnp.where(is_token, x, 0) for x in (k, v))
            solve = self._op(precondition, implementation=self.implementation)
            y = solve(k, v, segment_ids=segment_ids)
            v_norms = head_norms(v)
            gain = head_norms(y) / jnp.where(v_norms == 0, 1, v_norms)
            off_diagonal = self._op(largest_off_diagonal)(k, segment_ids=segment_ids)
            return jnp.stack([off_diagonal, gain])

        measured = self.layout.shard_map(
            measure, (_KV_AXES, _KV_AXES, _TOKEN_AXES), (None, "batch", "kv_heads")
        )(k, v, segment_ids)
        off_diagonal, gain = measured.max((1, 2))
        return {"off_diagonal": off_diagonal, "value_gain": gain}

    @property
    def implementation(self) -> str | None:
        """The configured implementation; None for "auto", as the ops expect."""
        return None if self.config.implementation == "auto" else self.config.implementation

    def _op(self, op: Callable[..., jax.Array], **arguments: Any) -> Callable[..., jax.Array]:
        """Binds arguments to `op`, or to its context-parallel form if the mesh splits sequences."""
        if axis := self.layout.mesh_axis("sequence"):
            op = _CONTEXT_PARALLEL[op]
            arguments |= {"axis_name": axis, "stripe": self.layout.stripe}
        return functools.partial(op, **arguments)

    def _softmax_op(self, temperature: float) -> Callable[..., jax.Array]:
        implementation = softmax_implementation(self.implementation)
        return self._op(softmax_attention, implementation=implementation, temperature=temperature)
