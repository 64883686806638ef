"""A decoder of the Llama family in Flax NNX, with LUCID or softmax attention per layer.

The parameters of all layers are stacked along a leading axis `layers` and the forward
pass scans over it, so that compile time does not grow with depth. Their shapes do not
depend on the attention kind: softmax checkpoints load into LUCID models and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lucid_jax import sequence_parallel
from lucid_jax.config import ModelConfig
from lucid_jax.ops import rope
from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.lucid_attention import lucid_attention, softmax_implementation
from lucid_jax.ops.norm import rms_norm
from lucid_jax.ops.precondition import precondition
from lucid_jax.ops.precondition.diagnostics import largest_off_diagonal
from lucid_jax.ops.remat import keeps_attention
from lucid_jax.sharding import Layout

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, keeps_attention
    ),
    "attention": keeps_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float):
    """A float32 parameter: its shape, its logical axes and its initialiser, in one place.

    Args:
      rngs: Source of the random key.
      shape: One size for each axis.
      axes: Logical names, which `lucid_jax.sharding` maps to the mesh.
      std: Of the normal distribution drawn from; 0 means ones (the scale of a norm).
    """
    assert len(shape) == len(axes), (shape, axes)
    if std == 0:
        return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class _Ops(NamedTuple):
    """The ops of rows that are all on one device, or of rows spread over several."""

    lucid_attention: Callable[..., jax.Array]
    softmax_attention: Callable[..., jax.Array]
    precondition: Callable[..., jax.Array]
    largest_off_diagonal: Callable[..., jax.Array]


class Attention(nnx.Module):
    """Grouped-query attention of one kind; parameters stacked over layers until scanned."""

    def __init__(self, config: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        n, e, d = config.num_layers, config.embed_dim, config.head_dim
        h, k = config.num_heads, config.num_kv_heads
        std, out_std = config.init_std, config.init_std / (2 * n) ** 0.5
        self.query = param(rngs, (n, e, h, d), ("layers", "embed", "heads", None), std)
        self.key = param(rngs, (n, e, k, d), ("layers", "embed", "kv_heads", None), std)
        self.value = param(rngs, (n, e, k, d), ("layers", "embed", "kv_heads", None), std)
        self.out = param(rngs, (n, h, d, e), ("layers", "heads", None, "embed"), out_std)
        self.config, self.layout = config, layout

    def __call__(
        self,
        x: jax.Array,
        rotations: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        is_lucid: jax.Array,
        telemetry: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`[B,S,E]` to `[B,S,E]`, and telemetry (empty unless asked for)."""
        dtype = x.dtype
        q = jnp.einsum("bse,ehd->bshd", x, self.query.astype(dtype))
        k = jnp.einsum("bse,ekd->bskd", x, self.key.astype(dtype))
        v = jnp.einsum("bse,ekd->bskd", x, self.value.astype(dtype))
        q, k = rope.rotate(q, *rotations), rope.rotate(k, *rotations)
        o = self._attend(q, k, v, segment_ids, is_lucid)
        out = jnp.einsum("bshd,hde->bse", o, self.out.astype(dtype))
        return out, self._telemetry(k, v, segment_ids) if telemetry else {}

    def _attend(self, q, k, v, segment_ids, is_lucid) -> jax.Array:
        config = self.config
        backend = None if config.implementation == "auto" else config.implementation
        ops = self._ops()
        kinds: dict[str, Callable[..., jax.Array]] = {
            "lucid": functools.partial(ops.lucid_attention, implementation=backend),
            "softmax": functools.partial(
                ops.softmax_attention,
                implementation=softmax_implementation(backend),
                temperature=config.temperature,
            ),
        }
        branches = [f for kind, f in kinds.items() if kind in config.layer_kinds]

        def attend(q, k, v, segment_ids, is_lucid):
            bound = [functools.partial(f, segment_ids=segment_ids) for f in branches]
            if len(bound) == 1:
                return bound[0](q, k, v)
            return jax.lax.cond(is_lucid, *bound, q, k, v)

        heads = ("batch", "sequence", "heads", None)
        kv_heads = ("batch", "sequence", "kv_heads", None)
        rows = ("batch", "sequence")
        return self.layout.shard_map(attend, (heads, kv_heads, kv_heads, rows, ()), heads)(
            q, k, v, segment_ids, is_lucid
        )

    def _ops(self) -> _Ops:
        axis = self.layout.mesh_axis("sequence")
        if axis is None:
            return _Ops(lucid_attention, softmax_attention, precondition, largest_off_diagonal)
        spread = (
            sequence_parallel.lucid_attention,
            sequence_parallel.softmax_attention,
            sequence_parallel.precondition,
            sequence_parallel.largest_off_diagonal,
        )
        where: dict[str, Any] = {"axis_name": axis, "stripe": self.layout.stripe}
        return _Ops(*(functools.partial(op, **where) for op in spread))

    def _telemetry(self, k, v, segment_ids) -> dict[str, jax.Array]:
        backend = None if self.config.implementation == "auto" else self.config.implementation
        ops, axis = self._ops(), self.layout.mesh_axis("sequence")

        def norm(x):
            square = jnp.sum(jnp.square(x.astype(jnp.float32)), (1, 3))
            return jnp.sqrt(square if axis is None else jax.lax.psum(square, axis))

        def measure(k, v, segment_ids):
            if segment_ids is not None:
                # Padding is in segment 0: zeros count for nothing.
                token = (segment_ids != 0)[..., None, None]
                k, v = (jnp.where(token, x, 0) for x in (k, v))
            y = ops.precondition(k, v, segment_ids=segment_ids, implementation=backend)
            v_norm = norm(v)
            gain = norm(y) / jnp.where(v_norm == 0, 1, v_norm)
            return jnp.stack([ops.largest_off_diagonal(k, segment_ids=segment_ids), gain])

        kv_heads = ("batch", "sequence", "kv_heads", None)
        measured = self.layout.shard_map(
            measure,
            (kv_heads, kv_heads, ("batch", "sequence")),
            (None, "batch", "kv_heads"),
        )(k, v, segment_ids)
        off_diagonal, gain = measured.max((1, 2))
        return {"off_diagonal": off_diagonal, "value_gain": gain}


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate x) · up x)`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        n, e, f = config.num_layers, config.embed_dim, config.mlp_dim
        std, out_std = config.init_std, config.init_std / (2 * n) ** 0.5
        self.gate = param(rngs, (n, e, f), ("layers", "embed", "mlp"), std)
        self.up = param(rngs, (n, e, f), ("layers", "embed", "mlp"), std)
        self.down = param(rngs, (n, f, e), ("layers", "mlp", "embed"), out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,S,E]` to `[B,S,E]`."""
        dtype = x.dtype
        hidden = jax.nn.silu(jnp.einsum("bse,ef->bsf", x, self.gate.astype(dtype)))
        hidden = hidden * jnp.einsum("bse,ef->bsf", x, self.up.astype(dtype))
        return jnp.einsum("bsf,fe->bse", hidden, self.down.astype(dtype))


class Block(nnx.Module):
    """A pre-norm layer: attention, then MLP, each on a residual."""

    def __init__(self, config: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        shape, axes = (config.num_layers, config.embed_dim), ("layers", None)
        self.attention_norm = param(rngs, shape, axes, std=0)
        self.attention = Attention(config, layout, rngs)
        self.mlp_norm = param(rngs, shape, axes, std=0)
        self.mlp = MLP(config, rngs)
        self.config, self.layout = config, layout

    def __call__(self, x, rotations, segment_ids, is_lucid, telemetry: bool):
        """`[B,S,E]` to `[B,S,E]`, and telemetry."""
        eps = self.config.norm_eps
        normed = rms_norm(x, self.attention_norm[...], eps)
        attended, measured = self.attention(normed, rotations, segment_ids, is_lucid, telemetry)
        x = x + attended
        x = x + self.mlp(rms_norm(x, self.mlp_norm[...], eps))
        return self.layout.constrain(x, "batch", "sequence", None), measured


class Transformer(nnx.Module):
    """Token ids to hidden states, and the output embedding that makes logits of them."""

    def __init__(self, config: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        v, e, std = config.vocab_size, config.embed_dim, config.init_std
        self.embedding = param(rngs, (v, e), ("vocab", "embed"), std)
        self.layers = Block(config, layout, rngs)
        self.final_norm = param(rngs, (e,), (None,), std=0)
        if not config.tie_embeddings:
            self.output = param(rngs, (e, v), ("embed", "vocab"), std)
        self.config, self.layout = config, layout

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        *,
        telemetry: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Hidden states after the last norm.

        Args:
          tokens: int32 `[B,S]`.
          positions: int32 `[B,S]`, of each token in its own segment. Where devices share a
            row its tokens are in the order of `Stripes`.
          segment_ids: int32 `[B,S]`, or None for one segment a row.
          telemetry: Whether to measure every layer, at the cost of another solve each.

        Returns:
          `x [B,S,E]` in the compute dtype, and per layer `[L]`: `off_diagonal`, the
          largest entry of `A` below its diagonal, and `value_gain`, the largest
          `‖y‖/‖v‖` of a head (at most 2); empty without telemetry.
        """
        config = self.config
        # Gathered over fsdp first: a lookup in a table split along E would end in a
        # full exchange of activations, which are larger than the table.
        table = self.embedding[...].astype(config.compute_dtype)
        x = self.layout.constrain(table, "vocab", None)[tokens]
        x = self.layout.constrain(x, "batch", "sequence", None)
        frequencies = rope.frequencies(
            config.head_dim,
            config.rope_base,
            config.rope_scaling,
            config.rope_factor,
            config.rope_original_length,
        )
        rotations = rope.rotations(positions, frequencies)
        graph, stacked = nnx.split(self.layers)

        def layer(x, scanned):
            state, is_lucid = scanned
            return nnx.merge(graph, state)(x, rotations, segment_ids, is_lucid, telemetry)

        if config.remat != "none":
            # Inside a scan nothing can be merged across layers, so no barrier is needed.
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
        is_lucid = np.array([kind == "lucid" for kind in config.layer_kinds])
        x, measured = jax.lax.scan(layer, x, (stacked, jnp.asarray(is_lucid)))
        return rms_norm(x, self.final_norm[...], config.norm_eps), measured

    @property
    def head(self) -> jax.Array:
        """The output embedding `[E,V]` in float32."""
        return self.embedding[...].T if self.config.tie_embeddings else self.output[...]


def abstract_model(config: ModelConfig, layout: Layout) -> tuple[nnx.GraphDef, Any]:
    """The structure of the model and its parameters as shapes with their shardings."""
    model = nnx.eval_shape(lambda: Transformer(config, layout, nnx.Rngs(params=0)))
    graph, params = nnx.split(model, nnx.Param)

    def with_sharding(variable):
        value = variable.get_value()
        sharding = layout.sharding(*variable.axes)
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    params = jax.tree.map(with_sharding, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return graph, params


def init_params(config: ModelConfig, layout: Layout, seed: int) -> Any:
    """Random parameters, made where they live."""
    _, abstract = abstract_model(config, layout)

    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
    def init():
        model = Transformer(config, layout, nnx.Rngs(params=seed))
        return nnx.state(model, nnx.Param)

    return init()


def count_params(params: Any) -> int:
    """How many numbers the parameters hold."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
