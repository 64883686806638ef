"""Attention over whole sequences, on one device or with context parallelism."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.ops import differential
from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.lucid_attention import (
    lucid_attention,
    measured_lucid_attention,
    softmax_implementation,
)
from lucid_jax.ops.precondition import precondition
from lucid_jax.ops.precondition.diagnostics import Diagnostics, Sample
from lucid_jax.parallel import context_attention
from lucid_jax.parallel.mesh import Layout

_Q_AXES = ("batch", "sequence", "heads", None)
_KV_AXES = ("batch", "sequence", "kv_heads", None)
_TOKEN_AXES = ("batch", "sequence")

# The context-parallel form of each op.
_CONTEXT_PARALLEL: dict[Callable, Callable] = {
    lucid_attention: context_attention.lucid_attention,
    measured_lucid_attention: context_attention.measured_lucid_attention,
    softmax_attention: context_attention.softmax_attention,
    precondition: context_attention.precondition,
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
        mixing: differential.Mixing | None,
        segment_ids: jax.Array | None,
        layer: jax.Array,
        sample: Sample | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes `o` of a layer, whose index `layer` (an int32 scalar) may be traced.

        Also returns the telemetry (see `Transformer`), empty without a `sample`.
        """
        rows, sampled_ids = sample or (None, None)

        def lucid(q, k, v, mixing, segment_ids, sampled_ids, layer):
            del mixing, layer
            options = {"segment_ids": segment_ids, "implementation": self.implementation}
            if rows is None:
                return self._op(lucid_attention)(q, k, v, **options), None
            sample = Sample(rows, sampled_ids)
            o, diagnostics = self._op(measured_lucid_attention)(q, k, v, sample=sample, **options)
            # The largest of the sequences and heads of all devices.
            largest = (jax.lax.pmax(x.max(), self.layout.mesh.axis_names) for x in diagnostics)
            return o, jnp.stack([*largest])

        def nothing(sampled_ids):
            return None if sampled_ids is None else jnp.zeros(len(Diagnostics._fields), jnp.float32)

        def softmax(q, k, v, mixing, segment_ids, sampled_ids, layer):
            del mixing, layer
            o = self._softmax_op(self.config.temperature)(q, k, v, segment_ids=segment_ids)
            return o, nothing(sampled_ids)

        def difference(q, k, v, mixing, segment_ids, sampled_ids, layer):
            op = self._softmax_op(temperature=1.0)
            o = op(*differential.expand(q, k, v), segment_ids=segment_ids)
            o = differential.combine(o, mixing, layer, k.shape[2], self.config.norm_eps)
            return o, nothing(sampled_ids)

        ops = {"lucid": lucid, "softmax": softmax, "differential": difference}
        kinds = [kind for kind in ops if kind in self.config.layer_kinds]
        branches = [ops[kind] for kind in kinds]

        def attend(*arrays):
            if len(branches) == 1:
                return branches[0](*arrays)
            branch = jnp.array([kinds.index(kind) for kind in self.config.layer_kinds])
            return jax.lax.switch(branch[arrays[-1]], branches, *arrays)

        in_axes = (_Q_AXES, _KV_AXES, _KV_AXES, (), _TOKEN_AXES, _TOKEN_AXES, ())
        o, measured = self.layout.shard_map(attend, in_axes, (_Q_AXES, ()))(
            q, k, v, mixing, segment_ids, sampled_ids, layer
        )
        return o, {} if measured is None else dict(zip(Diagnostics._fields, measured))

    def precondition(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """Computes `y`; each sequence is one segment."""
        op = self._op(precondition, implementation=self.implementation)
        return self.layout.shard_map(op, (_KV_AXES, _KV_AXES), _KV_AXES)(k, v)

    def softmax(self, q: jax.Array, k: jax.Array, v: jax.Array, temperature: float) -> jax.Array:
        """Computes `softmax(q kᵀ/(τ√D)) v`; each sequence is one segment."""
        op = self._softmax_op(temperature)
        return self.layout.shard_map(op, (_Q_AXES, _KV_AXES, _KV_AXES), _Q_AXES)(q, k, v)

    @property
    def implementation(self) -> str | None:
        """The configured implementation; None for "auto", as the ops expect."""
        return None if self.config.implementation == "auto" else self.config.implementation

    def _op(self, op: Callable, **arguments: Any) -> Callable:
        """Binds arguments to `op`, or to its context-parallel form if the mesh splits sequences."""
        if axis := self.layout.mesh_axis("sequence"):
            op = _CONTEXT_PARALLEL[op]
            arguments |= {"axis_name": axis, "stripe": self.layout.stripe}
        return functools.partial(op, **arguments)

    def _softmax_op(self, temperature: float) -> Callable[..., jax.Array]:
        implementation = softmax_implementation(self.implementation)
        return self._op(softmax_attention, implementation=implementation, temperature=temperature)
