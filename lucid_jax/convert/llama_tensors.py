"""The tensors of a Llama checkpoint and the parameters of a `Transformer` that they are.

A matrix there is `[outputs, inputs]`, with all heads in one axis and one tensor for each
layer. Both sides rotate halves against each other (`ops/rope.py`), so that heads need no
permutation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lucid_jax.config import Config, ModelConfig
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout

# By parameter: the name of the tensor, and how many axes of the parameter its product sums
# over, those in front; 0 for tensors that are no matrix of a product.
_WHOLE = {
    "embedding": ("model.embed_tokens.weight", 0),
    "final_norm": ("model.norm.weight", 0),
    "output": ("lm_head.weight", 1),
}
_OF_LAYERS = {
    "layers.attention_norm": ("input_layernorm.weight", 0),
    "layers.attention.query": ("self_attn.q_proj.weight", 1),
    "layers.attention.key": ("self_attn.k_proj.weight", 1),
    "layers.attention.value": ("self_attn.v_proj.weight", 1),
    "layers.attention.out": ("self_attn.o_proj.weight", 2),
    "layers.mlp_norm": ("post_attention_layernorm.weight", 0),
    "layers.mlp.gate": ("mlp.gate_proj.weight", 1),
    "layers.mlp.up": ("mlp.up_proj.weight", 1),
    "layers.mlp.down": ("mlp.down_proj.weight", 1),
}


@dataclasses.dataclass(frozen=True)
class LlamaTensor:
    """One tensor, and where it is in our parameters.

    Attributes:
      name: Of the tensor.
      parameter: Of the model, as in `"layers.mlp.gate"`.
      layer: Its place along the first axis of the parameter; None: it is all of it.
      ours: Shape in the parameter.
      summed: As in the tables above.
    """

    name: str
    parameter: str
    layer: int | None
    ours: tuple[int, ...]
    summed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        if not self.summed:
            return self.ours
        return math.prod(self.ours[self.summed :]), math.prod(self.ours[: self.summed])

    def put(self, tensor: np.ndarray, parameter: np.ndarray) -> None:
        """Writes the tensor into its place, in the type of the parameter."""
        outputs = len(self.ours) - self.summed
        split = tensor.reshape(self.ours[self.summed :] + self.ours[: self.summed])
        self._place(parameter)[...] = _turn(split, outputs)

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor out of its place; a view where the layouts allow it."""
        return _turn(self._place(parameter), self.summed).reshape(self.shape)

    def _place(self, parameter: np.ndarray) -> np.ndarray:
        return parameter[... if self.layer is None else self.layer]


def _turn(x: np.ndarray, count: int) -> np.ndarray:
    """The first `count` axes behind the others."""
    return x.transpose(*range(count, x.ndim), *range(count))


def llama_tensors(params: Any) -> list[LlamaTensor]:
    """The tensors of a model with these parameters, layer by layer."""
    shapes = {name: x.shape for name, x in by_name(params).items()}
    whole = {
        parameter: LlamaTensor(name, parameter, None, shapes[parameter], summed)
        for parameter, (name, summed) in _WHOLE.items()
        # Tied embeddings have no output of their own.
        if parameter in shapes
    }
    layers = [
        LlamaTensor(f"model.layers.{i}.{name}", parameter, i, shapes[parameter][1:], summed)
        for i in range(shapes["layers.attention_norm"][0])
        for parameter, (name, summed) in _OF_LAYERS.items()
    ]
    return [whole.pop("embedding"), *layers, *whole.values()]


def abstract_params(model: ModelConfig) -> Any:
    """The parameters of a model as shapes, on one CPU."""
    layout = make_layout(Config(model=model), jax.devices("cpu")[:1])
    return LanguageModel.build(model, layout).abstract_params


def by_name(params: Any) -> dict[str, Any]:
    """The leaves in their order, by the names used here."""
    leaves = jax.tree.leaves_with_path(params)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {name.removesuffix(".value"): x for name, (_, x) in zip(names, leaves)}
