"""Attention over whole sequences, on one device or with context parallelism."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.models.inputs import Inputs
from lucid_jax.ops import differential
from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.lucid_attention import (
    lucid_attention,
    measured_lucid_attention,
    softmax_implementation,
)
from lucid_jax.ops.precondition import precondition
from lucid_jax.ops.precondition.diagnostics import Diagnostics, Sample
from lucid_jax.ops.transitions import Transitions
from lucid_jax.parallel import context_attention
from lucid_jax.parallel.mesh import Layout

_Q_AXES = ("batch", "sequence", "heads", None)
_KV_AXES = ("batch", "sequence", "kv_heads", None)
# The leading axes of β and of the arrays of transitions.
_GATE_AXES = ("batch", "sequence", "kv_heads")
_TOKEN_AXES = ("batch", "sequence")

# The context-parallel form of each op.
_CONTEXT_PARALLEL: dict[Callable, Callable] = {
    lucid_attention: context_attention.lucid_attention,
    measured_lucid_attention: context_attention.measured_lucid_attention,
    softmax_attention: context_attention.softmax_attention,
    precondition: context_attention.precondition,
}


def measures(has_transitions: bool) -> tuple[str, ...]:
    """Returns the names of what the telemetry measures."""
    return tuple(x for x in Diagnostics._fields if not (has_transitions and x == "off_diagonal"))


def _given(transitions: Transitions | None) -> dict[str, Transitions]:
    """Returns the argument of an op, without it if there is none: context parallelism has none."""
    return {} if transitions is None else {"transitions": transitions}


@dataclasses.dataclass(frozen=True)
class ShardedAttention:
    """The attention ops of a model's layers on its mesh.

    `q` and `o` are `[B,S,H,D]`, `k`, `v` and `y` are `[B,S,K,D]`, `beta` is `[B,S,K]`, segment ids
    are `[B,S]`. With context parallelism the tokens are in the order of `Stripes`.
    """

    config: ModelConfig
    layout: Layout

    def attend(
        self,
        inputs: Inputs,
        segment_ids: jax.Array | None,
        layer: jax.Array,
        sample: Sample | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes `o` of a layer, whose index `layer` (an int32 scalar) may be traced.

        Also returns the telemetry (see `Transformer`), empty without a `sample`.
        """
        rows, sampled_ids = sample or (None, None)
        directions = inputs.directions
        transitions = None if directions is None else directions.transitions(segment_ids)

        def lucid(q, k, v, mixing, beta, transitions, segment_ids, sampled_ids, layer):
            del mixing, layer
            options = {
                "segment_ids": segment_ids,
                "beta": beta,
                "implementation": self.implementation,
                **_given(transitions),
            }
            if rows is None:
                return self._op(lucid_attention)(q, k, v, **options), {}
            sample = Sample(rows, sampled_ids)
            o, diagnostics = self._op(measured_lucid_attention)(q, k, v, sample=sample, **options)
            # The largest of the sequences and heads of all devices.
            return o, {
                name: jax.lax.pmax(x.max(), self.layout.mesh.axis_names)
                for name, x in diagnostics._asdict().items()
                if x is not None
            }

        def nothing(transitions):
            names = () if rows is None else measures(transitions is not None)
            return dict.fromkeys(names, jnp.float32(0))

        def softmax(q, k, v, mixing, beta, transitions, segment_ids, sampled_ids, layer):
            del mixing, beta, sampled_ids, layer
            op = self._softmax_op(self.config.temperature)
            o = op(q, k, v, segment_ids=segment_ids, **_given(transitions))
            return o, nothing(transitions)

        def difference(q, k, v, mixing, beta, transitions, segment_ids, sampled_ids, layer):
            del beta, sampled_ids
            op = self._softmax_op(temperature=1.0)
            o = op(*differential.expand(q, k, v), segment_ids=segment_ids)
            o = differential.combine(o, mixing, layer, k.shape[2], self.config.norm_eps)
            return o, nothing(transitions)

        ops = {"lucid": lucid, "softmax": softmax, "differential": difference}
        kinds = [kind for kind in ops if kind in self.config.layer_kinds]
        branches = [ops[kind] for kind in kinds]

        def attend(*arrays):
            if len(branches) == 1:
                return branches[0](*arrays)
            branch = jnp.array([kinds.index(kind) for kind in self.config.layer_kinds])
            return jax.lax.switch(branch[arrays[-1]], branches, *arrays)

        in_axes = (
            _Q_AXES, _KV_AXES, _KV_AXES, (), _GATE_AXES, _GATE_AXES, _TOKEN_AXES, _TOKEN_AXES, (),
        )  # fmt: skip
        q, k, v, mixing, beta, _ = inputs
        return self.layout.shard_map(attend, in_axes, (_Q_AXES, ()))(
            q, k, v, mixing, beta, transitions, segment_ids, sampled_ids, layer
        )

    def precondition(
        self,
        k: jax.Array,
        v: jax.Array,
        beta: jax.Array | None,
        transitions: Transitions | None,
    ) -> jax.Array:
        """Computes `y`; each sequence is one segment."""
        op = self._op(precondition, implementation=self.implementation)

        def solve(k, v, beta, transitions):
            return op(k, v, beta=beta, **_given(transitions))

        axes = _KV_AXES, _KV_AXES, _GATE_AXES, _GATE_AXES
        return self.layout.shard_map(solve, axes, _KV_AXES)(k, v, beta, transitions)

    def softmax(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        transitions: Transitions | None,
        temperature: float,
    ) -> jax.Array:
        """Computes the softmax attention of whole sequences, each of them one segment."""
        op = self._softmax_op(temperature)

        def attend(q, k, v, transitions):
            return op(q, k, v, **_given(transitions))

        axes = _Q_AXES, _KV_AXES, _KV_AXES, _GATE_AXES
        return self.layout.shard_map(attend, axes, _Q_AXES)(q, k, v, transitions)

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
