"""The model over a cache: prompts in chunks, then one token of each row at a time.

Layers are those of training, but unrolled, each with its parameters and its cache in arrays
of their own. A scan would slice them from stacks, and a slice that goes into a library's
product is a copy: everything that a step reads would be written and read once more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lucid_jax.inference.kv_cache import Cache, CachedAttention
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderParams:
    """Parameters in the compute dtype, norms in float32 as training reads them.

    Attributes:
      outer: Those outside of the layers.
      layers: Those of each layer.
    """

    outer: Any
    layers: tuple[Any, ...]


class Decoder:
    """The functions of one model, to be traced under jit."""

    def __init__(self, model: LanguageModel):
        self.config, self.layout = model.config, model.layout
        self.attention = CachedAttention(model.config, model.layout)
        self._model = model

    def prepare(self, params: Any) -> DecoderParams:
        """A copy of the parameters of a `Transformer`, cast once and for all, layer by layer."""

        def cast(variable: nnx.Variable, index: tuple[int, ...]) -> nnx.Variable:
            value = variable.get_value()[index]
            if value.ndim > 1:
                value = value.astype(self.config.compute_dtype)
            axes = variable.axes[len(index) :]
            return variable.replace(self.layout.constrain(value, *axes))

        def part(state: Any, *index: int) -> Any:
            return jax.tree.map(
                lambda x: cast(x, index), state, is_leaf=lambda x: isinstance(x, nnx.Variable)
            )

        outer = {name: state for name, state in params.items() if name != "layers"}
        layers = (part(params["layers"], i) for i in range(self.config.num_layers))
        return DecoderParams(part(outer), tuple(layers))

    def prefill(
        self,
        params: DecoderParams,
        cache: Cache,
        tokens: jax.Array,
        positions: jax.Array,
        start: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        """Hidden states `[B,T,E]` of the next T tokens of all rows, and the cache with them.

        Args:
          params: Of the model.
          cache: Of all tokens before.
          tokens: int32 `[B,T]`, any tokens behind the end of a row. The first ones are in the
            order of `Stripes`; only they can be where devices share a row.
          positions: int32 `[B,T]`.
          start: int32, how many tokens there are before; None where there are none.
        """
        attention = self.attention

        def attend(kind, layer):
            if start is None:
                return functools.partial(attention.start, kind, layer)
            return functools.partial(attention.extend, kind, layer, start)

        return self._run(params, cache, tokens, positions, attend, ("batch", "sequence", None))

    def step(
        self, params: DecoderParams, cache: Cache, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Hidden states `[B,E]` of one more token `[B]` of each row, and the cache with it.

        `lengths` is int32 `[B]`: the tokens before.
        """

        def attend(kind, layer):
            return functools.partial(self.attention.step, kind, layer, lengths)

        axes = ("batch", None, None)
        x, cache = self._run(params, cache, tokens[:, None], lengths[:, None], attend, axes)
        return x[:, 0], cache

    def logits(self, params: DecoderParams, x: jax.Array) -> jax.Array:
        """float32 `[B,V]` of hidden states `[B,E]`."""
        head = self._merge(params, 0).head.astype(x.dtype)
        logits = jnp.einsum("be,ev->bv", x, head, preferred_element_type=jnp.float32)
        return self.layout.constrain(logits, "batch", None)

    def _run(
        self,
        params: DecoderParams,
        cache: Cache,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Callable[..., Callable],
        axes: tuple[str | None, ...],
    ) -> tuple[jax.Array, Cache]:
        model = self._merge(params, 0)
        x = self.layout.constrain(model.embed(tokens), *axes)
        rotations = model.rotations(positions)
        written = []
        for i, (kind, layer) in enumerate(zip(self.config.layer_kinds, cache, strict=True)):
            x, layer = self._merge(params, i).layers(x, rotations, attend(kind, layer))
            x = self.layout.constrain(x, *axes)
            written.append(layer)
        return model.normalize(x), tuple(written)

    def _merge(self, params: DecoderParams, layer: int) -> Transformer:
        """A model with one layer's parameters where the stack was: its structure is the same."""
        state = {**params.outer, "layers": params.layers[layer]}
        return self._model.merge(nnx.State(state))
