"""The model with a KV cache: prefill of prompts, then decode steps of one token a sequence.

The layers are those of training, but unrolled, and each has its own arrays of parameters and
cache. A scan would slice them from stacked arrays, and a slice that is the operand of a library's
product is copied: every step would write and reread everything it reads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lucid_jax.inference.kv_cache import CachedAttention, KVCache
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.transformer import Attend, Transformer
from lucid_jax.ops import differential


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderParams:
    """Parameters of each layer and outside the layers, in the compute dtype.

    Norms stay in float32, as in training.
    """

    outer: Any
    layers: tuple[Any, ...]


class Decoder:
    """Prefill and decode steps of one model; call its methods under jit."""

    def __init__(self, model: LanguageModel):
        self.config, self.layout = model.config, model.layout
        self.attention = CachedAttention(model.config, model.layout)
        self._model = model

    def prepare(self, params: Any) -> DecoderParams:
        """Copies the parameters of a `Transformer`, cast and unstacked layer by layer."""

        def cast(variable: nnx.Variable, index: tuple[int, ...]) -> nnx.Variable:
            value = variable.get_value()[index]
            if value.ndim > 1:
                value = value.astype(self.config.compute_dtype)
            axes = variable.axes[len(index) :]
            return variable.replace(self.layout.constrain(value, *axes))

        def cast_all(state: Any, *index: int) -> Any:
            return jax.tree.map(
                lambda x: cast(x, index), state, is_leaf=lambda x: isinstance(x, nnx.Variable)
            )

        outer = {name: state for name, state in params.items() if name != "layers"}
        layers = (cast_all(params["layers"], i) for i in range(self.config.num_layers))
        return DecoderParams(cast_all(outer), tuple(layers))

    def prefill(
        self,
        params: DecoderParams,
        cache: KVCache,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        start: jax.Array | None,
    ) -> tuple[jax.Array, KVCache]:
        """Reads the next T prompt tokens of all sequences into the cache.

        Args:
          cache: The cache of all tokens before.
          tokens: int32 `[B,T]`; whatever follows the end of a prompt is padding. With context
            parallelism the tokens are in the order of `Stripes`.
          positions: int32 `[B,T]`, in the same order.
          lengths: int32 `[B]`, the number of tokens of each prompt.
          start: int32, the number of tokens in the cache; None if it is empty, as context
            parallelism and PaTH require.

        Returns:
          Hidden states `[B,T,E]`, and the cache with these tokens.
        """
        axes = ("batch", "sequence", None)
        run = functools.partial(self._run, params, cache, tokens, positions, axes)
        if start is None:
            return run(self.attention.prefill, lengths)
        return run(self.attention.prefill_chunk, start)

    def step(
        self, params: DecoderParams, cache: KVCache, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Decodes one token int32 `[B]` of each sequence, after `lengths` int32 `[B]` cached ones.

        Returns hidden states `[B,E]`, and the cache with these tokens.
        """
        axes, attend = ("batch", None, None), self.attention.step
        tokens, positions = tokens[:, None], lengths[:, None]
        x, cache = self._run(params, cache, tokens, positions, axes, attend, lengths)
        return x[:, 0], cache

    def logits(self, params: DecoderParams, x: jax.Array) -> jax.Array:
        """Computes float32 logits `[B,V]` from hidden states `[B,E]`."""
        head = self._merge(params, 0).head.astype(x.dtype)
        logits = jnp.einsum("be,ev->bv", x, head, preferred_element_type=jnp.float32)
        return self.layout.constrain(logits, "batch", None)

    def _run(
        self,
        params: DecoderParams,
        cache: KVCache,
        tokens: jax.Array,
        positions: jax.Array,
        axes: tuple[str | None, ...],
        attend: Callable[..., tuple[jax.Array, Any]],
        *attend_args: jax.Array,
    ) -> tuple[jax.Array, KVCache]:
        """Runs all layers on `tokens [B,T]`; `axes` are the logical axes of the activations."""
        model = self._merge(params, 0)
        x = self.layout.constrain(model.embed(tokens), *axes)
        rotations = model.rotations(positions)
        updated = []
        for i, (kind, layer_cache) in enumerate(zip(self.config.layer_kinds, cache, strict=True)):
            softmax_or_lucid = functools.partial(attend, kind, layer_cache, *attend_args)
            attend_layer = self._attend_layer(i, softmax_or_lucid)
            x, layer_cache = self._merge(params, i).layers(x, rotations, attend_layer)
            x = self.layout.constrain(x, *axes)
            updated.append(layer_cache)
        return model.normalize(x), tuple(updated)

    def _attend_layer(self, layer: int, attend: Callable[..., tuple[jax.Array, Any]]) -> Attend:
        """Returns the attention of a layer from softmax or LUCID attention."""
        config = self.config

        def attend_layer(inputs):
            if config.layer_kinds[layer] != "differential":
                return attend(inputs)
            q, k, v = differential.expand(inputs.q, inputs.k, inputs.v)
            o, cache = attend(inputs._replace(q=q, k=k, v=v))
            kv_heads = inputs.k.shape[2]
            return differential.combine(o, inputs.mixing, layer, kv_heads, config.norm_eps), cache

        return attend_layer

    def _merge(self, params: DecoderParams, layer: int) -> Transformer:
        """Returns a model whose `layers` are this one layer; its graph definition is the same."""
        state = {**params.outer, "layers": params.layers[layer]}
        return self._model.merge(nnx.State(state))
