"""Attention over whole sequences, on one device or with context parallelism."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from lucid_jax.config import ModelConfig
from lucid_jax.models.inputs import Directions, Inputs
from lucid_jax.ops import differential
from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.lucid_attention import (
    lucid_attention,
    measured_lucid_attention,
    softmax_implementation,
)
from lucid_jax.ops.precondition import precondition
from lucid_jax.ops.precondition.diagnostics import Diagnostics, Sample
from lucid_jax.ops.short_convolution import short_convolution
from lucid_jax.ops.transitions import Transitions
from lucid_jax.parallel import context_attention, context_convolution
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
    short_convolution: context_convolution.short_convolution,
}


class _Shard(NamedTuple):
    """The arguments of a layer's attention on one device; None for those it does not take."""

    q: Any
    k: Any
    v: Any
    mixing: Any
    beta: Any
    directions: Any
    segment_ids: Any
    sampled_ids: Any


_DIRECTION_AXES = cast(Any, Directions)(_KV_AXES, (None, "kv_heads", None), _GATE_AXES)


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

        def transitions(x):
            if x.directions is None:
                return None
            return x.directions.transitions(
                convolve=self._op(short_convolution), segment_ids=x.segment_ids
            )

        def lucid(x, layer):
            del layer
            options = {
                "segment_ids": x.segment_ids, "beta": x.beta, "transitions": transitions(x),
                "implementation": self.implementation,
            }  # fmt: skip
            if rows is None:
                return self._op(lucid_attention)(x.q, x.k, x.v, **options), None
            op = self._op(measured_lucid_attention)
            o, diagnostics = op(x.q, x.k, x.v, sample=Sample(rows, x.sampled_ids), **options)
            # The largest of the sequences and heads of all devices.
            axes = self.layout.mesh.axis_names
            return o, jax.tree.map(lambda y: jax.lax.pmax(y.max(), axes), diagnostics)

        def nothing(x):
            if x.sampled_ids is None:
                return None
            zero = jnp.float32(0)
            return Diagnostics(zero if x.directions is None else None, zero)

        def softmax(x, layer):
            del layer
            op = self._softmax_op(self.config.temperature)
            o = op(x.q, x.k, x.v, segment_ids=x.segment_ids, transitions=transitions(x))
            return o, nothing(x)

        def difference(x, layer):
            op = self._softmax_op(temperature=1.0)
            o = op(*differential.expand(x.q, x.k, x.v), segment_ids=x.segment_ids)
            o = differential.combine(o, x.mixing, layer, x.k.shape[2], self.config.norm_eps)
            return o, nothing(x)

        ops = {"lucid": lucid, "softmax": softmax, "differential": difference}
        kinds = [kind for kind in ops if kind in self.config.layer_kinds]
        branches = [ops[kind] for kind in kinds]

        def attend(x, layer):
            if len(branches) == 1:
                return branches[0](x, layer)
            branch = jnp.array([kinds.index(kind) for kind in self.config.layer_kinds])
            return jax.lax.switch(branch[layer], branches, x, layer)

        axes = _Shard(
            _Q_AXES, _KV_AXES, _KV_AXES, (), _GATE_AXES,
            # An argument that is None has no tree of axes.
            None if inputs.directions is None else _DIRECTION_AXES,
            _TOKEN_AXES, _TOKEN_AXES,
        )  # fmt: skip
        run = self.layout.shard_map(attend, (axes, ()), (_Q_AXES, ()))
        o, measured = run(_Shard(*inputs, segment_ids, sampled_ids), layer)
        found = {} if measured is None else measured._asdict()
        return o, {name: x for name, x in found.items() if x is not None}

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
            return op(k, v, beta=beta, transitions=transitions)

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
            return op(q, k, v, transitions=transitions)

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
        implementation = self.implementation
        if self.config.positions != "path":
            implementation = softmax_implementation(implementation)
        return self._op(softmax_attention, implementation=implementation, temperature=temperature)
