"""A Llama-family decoder in Flax NNX; each layer has a kind of attention.

The parameters of all layers are stacked along a leading axis `layers` and the forward
pass scans over it, so compile time does not grow with depth. Parameter shapes do not
depend on whether a layer is LUCID or softmax, so checkpoints of either load into the other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lucid_jax.config import ModelConfig
from lucid_jax.models.attention import ShardedAttention
from lucid_jax.models.inputs import CONVOLUTION_WIDTH, Directions, Inputs
from lucid_jax.ops import differential, rope
from lucid_jax.ops.norm import rms_norm
from lucid_jax.ops.precondition.diagnostics import Sample
from lucid_jax.ops.remat import saves_attention
from lucid_jax.parallel.mesh import Layout

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, saves_attention
    ),
    "attention": saves_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float):
    """Declares a float32 parameter.

    Args:
      axes: Logical axis names, which `lucid_jax.parallel.mesh` maps to the mesh.
      std: Standard deviation of the initial normal values.
    """
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def constant_param(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]):
    """Declares a float32 parameter that starts from one value: a norm's scale, or a bias."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


# Cosines and sines of RoPE; None without it.
Rotations = tuple[jax.Array, jax.Array] | None
# Computes `o` and an auxiliary output: telemetry or the updated KV cache.
Attend = Callable[[Inputs], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Grouped-query attention; the parameters of all layers are stacked until scanned over."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        n, e, d = config.num_layers, config.embed_dim, config.head_dim
        h, k = config.num_heads, config.num_kv_heads
        std, out_std = config.init_std, config.init_std / (2 * n) ** 0.5
        self.query = param(rngs, (n, e, h, d), ("layers", "embed", "heads", None), std)
        self.key = param(rngs, (n, e, k, d), ("layers", "embed", "kv_heads", None), std)
        self.value = param(rngs, (n, e, k, d), ("layers", "embed", "kv_heads", None), std)
        self.out = param(rngs, (n, h, d, e), ("layers", "heads", None, "embed"), out_std)
        if config.attention_bias:
            self.query_bias = constant_param(0, (n, h, d), ("layers", "heads", None))
            self.key_bias = constant_param(0, (n, k, d), ("layers", "kv_heads", None))
            self.value_bias = constant_param(0, (n, k, d), ("layers", "kv_heads", None))
        if config.qk_norm == "rms":
            self.query_norm = constant_param(1, (n, d), ("layers", None))
            self.key_norm = constant_param(1, (n, d), ("layers", None))
        if "differential" in config.layer_kinds:
            # The deviation of the authors' code.
            self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
                param(rngs, (n, d), ("layers", None), 0.1) for _ in range(4)
            )
            self.head_norm = constant_param(1, (n, 2 * d), ("layers", None))
        if config.positions == "path":
            # The authors' code has the same for grouped heads, and rank 32 where K = H.
            self.direction = param(rngs, (n, e, k, d), ("layers", "embed", "kv_heads", None), std)
            # The deviation of the authors' code, which draws convolutions as it draws projections.
            taps = n, CONVOLUTION_WIDTH, k, d
            self.direction_taps = param(rngs, taps, ("layers", None, "kv_heads", None), std)
            self.transition_beta = param(rngs, (n, e, k), ("layers", "embed", "kv_heads"), std)
            self.transition_beta_bias = constant_param(0, (n, k), ("layers", "kv_heads"))
        if config.lucid_beta:
            self.lucid_beta = param(rngs, (n, e, k), ("layers", "embed", "kv_heads"), std)
            # β starts near 1/(1 + e⁻⁴) = 0.98, almost at LUCID without it.
            self.lucid_beta_bias = constant_param(4, (n, k), ("layers", "kv_heads"))
        self.config = config

    def __call__(self, x: jax.Array, rotations: Rotations, attend: Attend) -> tuple[jax.Array, Any]:
        """Maps `[B,S,E]` to `[B,S,E]`; also returns the auxiliary output of `attend`."""
        dtype = x.dtype
        q = jnp.einsum("bse,ehd->bshd", x, self.query.astype(dtype))
        k = jnp.einsum("bse,ekd->bskd", x, self.key.astype(dtype))
        v = jnp.einsum("bse,ekd->bskd", x, self.value.astype(dtype))
        if self.config.attention_bias:
            q += self.query_bias.astype(dtype)
            k += self.key_bias.astype(dtype)
            v += self.value_bias.astype(dtype)
        if self.config.qk_norm != "none":
            learnt = self.config.qk_norm == "rms"
            q = rms_norm(q, self.query_norm[...] if learnt else 1.0, self.config.norm_eps)
            k = rms_norm(k, self.key_norm[...] if learnt else 1.0, self.config.norm_eps)
        if rotations is not None:
            q, k = rope.rotate(q, *rotations), rope.rotate(k, *rotations)
        inputs = Inputs(q, k, v, self._mixing(), self._lucid_beta(x), self._directions(x))
        o, aux = attend(inputs)
        return jnp.einsum("bshd,hde->bse", o, self.out.astype(dtype)), aux

    def _mixing(self) -> differential.Mixing | None:
        if "differential" not in self.config.layer_kinds:
            return None
        vectors = self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2
        weight = differential.learnt_weight(*(x[...] for x in vectors))
        return differential.Mixing(weight, self.head_norm[...])

    def _lucid_beta(self, x: jax.Array) -> jax.Array | None:
        if not self.config.lucid_beta:
            return None
        return _gate(x, self.lucid_beta[...], self.lucid_beta_bias[...])

    def _directions(self, x: jax.Array) -> Directions | None:
        if self.config.positions != "path":
            return None
        projected = jnp.einsum("bse,ekd->bskd", x, self.direction.astype(x.dtype))
        beta = 2 * _gate(x, self.transition_beta[...], self.transition_beta_bias[...])
        return Directions(projected, self.direction_taps.astype(x.dtype), beta.astype(x.dtype))


def _gate(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the sigmoid of a projection of `x [B,S,E]` to the KV heads, float32 `[B,S,K]`."""
    logits = jnp.einsum(
        "bse,ek->bsk", x, weight.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return jax.nn.sigmoid(logits + bias)


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate x) · up x)`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        n, e, f = config.num_layers, config.embed_dim, config.mlp_dim
        std, out_std = config.init_std, config.init_std / (2 * n) ** 0.5
        self.gate = param(rngs, (n, e, f), ("layers", "embed", "mlp"), std)
        self.up = param(rngs, (n, e, f), ("layers", "embed", "mlp"), std)
        self.down = param(rngs, (n, f, e), ("layers", "mlp", "embed"), out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B,S,E]` to `[B,S,E]`."""
        dtype = x.dtype
        hidden = jax.nn.silu(jnp.einsum("bse,ef->bsf", x, self.gate.astype(dtype)))
        hidden = hidden * jnp.einsum("bse,ef->bsf", x, self.up.astype(dtype))
        return jnp.einsum("bsf,fe->bse", hidden, self.down.astype(dtype))


class Block(nnx.Module):
    """A pre-norm layer: attention, then MLP, each with a residual connection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape, axes = (config.num_layers, config.embed_dim), ("layers", None)
        self.attention_norm = constant_param(1, shape, axes)
        self.attention = Attention(config, rngs)
        self.mlp_norm = constant_param(1, shape, axes)
        self.mlp = MLP(config, rngs)
        self.norm_eps = config.norm_eps

    def __call__(self, x: jax.Array, rotations: Rotations, attend: Attend) -> tuple[jax.Array, Any]:
        """Maps `[B,S,E]` to `[B,S,E]`; also returns the auxiliary output of `attend`."""
        normed = rms_norm(x, self.attention_norm[...], self.norm_eps)
        attended, aux = self.attention(normed, rotations, attend)
        x = x + attended
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.norm_eps)), aux


class Transformer(nnx.Module):
    """Maps token ids to hidden states; `head` maps these to logits."""

    def __init__(self, config: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        v, e, std = config.vocab_size, config.embed_dim, config.init_std
        self.embedding = param(rngs, (v, e), ("vocab", "embed"), std)
        self.layers = Block(config, rngs)
        self.final_norm = constant_param(1, (e,), (None,))
        if not config.tie_embeddings:
            self.output = param(rngs, (e, v), ("embed", "vocab"), std)
        self.config, self.layout = config, layout

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        *,
        sample: Sample | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the hidden states after the final norm.

        Args:
          tokens: int32 `[B,S]`; with context parallelism, in the order of `Stripes`.
          positions: int32 `[B,S]`, the position of each token in its segment.
          segment_ids: int32 `[B,S]`, or None if every sequence is one segment.
          sample: What the telemetry measures.

        Returns:
          `x [B,S,E]` in the compute dtype, and the telemetry: the largest `Diagnostics` of any
          sequence by name, float32 `[L]` each, zero for other layers than LUCID's. PaTH models
          have no `off_diagonal`. Without a `sample` it is empty.
        """
        config, attention = self.config, ShardedAttention(self.config, self.layout)
        x = self.layout.constrain(self.embed(tokens), "batch", "sequence", None)
        rotations = self.rotations(positions)
        graph, stacked = nnx.split(self.layers)

        def layer(x, scanned):
            state, index = scanned

            def attend(inputs):
                return attention.attend(inputs, segment_ids, index, sample)

            x, measured = nnx.merge(graph, state)(x, rotations, attend)
            return self.layout.constrain(x, "batch", "sequence", None), measured

        if config.remat != "none":
            # No barrier needed: inside a scan XLA cannot merge recomputation with the forward pass.
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
        x, measured = jax.lax.scan(layer, x, (stacked, jnp.arange(config.num_layers)))
        return self.normalize(x), measured

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds int32 tokens `[B,S]`; returns `[B,S,E]` in the compute dtype."""
        # The table is gathered over fsdp first, because a lookup in a table split along E would
        # end in an exchange of the activations, which are larger than the table.
        table = self.layout.constrain(self.embedding[...], "vocab", None)
        # The cast comes last so that gradients add up in float32: a frequent token occurs
        # thousands of times, and bfloat16 stops counting ones at 256.
        return table[tokens].astype(self.config.compute_dtype)

    def rotations(self, positions: jax.Array) -> Rotations:
        """Returns the cosines and sines for `rope.rotate` at int32 positions `[B,S]`, if any."""
        config = self.config
        if config.positions != "rope":
            return None
        frequencies = rope.frequencies(
            config.head_dim,
            config.rope_base,
            config.rope_scaling,
            config.rope_factor,
            config.rope_original_length,
        )
        return rope.rotations(positions, frequencies)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Applies the final norm to `[B,S,E]`."""
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)

    @property
    def head(self) -> jax.Array:
        """The output embedding `[E,V]`, float32."""
        return self.embedding[...].T if self.config.tie_embeddings else self.output[...]
