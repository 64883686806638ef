"""Maps the tensors of a Llama-like checkpoint to the parameters of a `Transformer`.

Hugging Face stores matrices as `[outputs, inputs]`, with all heads in one axis and one tensor
for each layer. Both sides rotate halves against each other (`ops/rope.py`), so the entries of a
head need no permutation.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lucid_jax.checkpoint.record import named_leaves
from lucid_jax.config import Config, ModelConfig
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout

# For each parameter: its tensor's name, and how many leading axes of the parameter are the
# inputs of its matrix product, 0 for a bias; None if the tensor has the parameter's axes.
_OUTER_TENSORS: dict[str, tuple[str, int | None]] = {
    "embedding": ("model.embed_tokens.weight", None),
    "final_norm": ("model.norm.weight", None),
    "output": ("lm_head.weight", 1),
}
_LAYER_TENSORS: dict[str, tuple[str, int | None]] = {
    "layers.attention_norm": ("input_layernorm.weight", None),
    "layers.attention.query": ("self_attn.q_proj.weight", 1),
    "layers.attention.key": ("self_attn.k_proj.weight", 1),
    "layers.attention.value": ("self_attn.v_proj.weight", 1),
    "layers.attention.out": ("self_attn.o_proj.weight", 2),
    "layers.attention.query_bias": ("self_attn.q_proj.bias", 0),
    "layers.attention.key_bias": ("self_attn.k_proj.bias", 0),
    "layers.attention.value_bias": ("self_attn.v_proj.bias", 0),
    "layers.attention.query_norm": ("self_attn.q_norm.weight", None),
    "layers.attention.key_norm": ("self_attn.k_norm.weight", None),
    "layers.mlp_norm": ("post_attention_layernorm.weight", None),
    "layers.mlp.gate": ("mlp.gate_proj.weight", 1),
    "layers.mlp.up": ("mlp.up_proj.weight", 1),
    "layers.mlp.down": ("mlp.down_proj.weight", 1),
}


@dataclasses.dataclass(frozen=True)
class LlamaTensor:
    """A Hugging Face tensor and its place in our parameters.

    Attributes:
      parameter: The parameter's name, such as `"layers.mlp.gate"`.
      layer: The tensor's index along the parameter's first axis; None if it is all of it.
      param_shape: The tensor's shape in the parameter, inputs first.
      input_axes: How many leading axes of `param_shape` are inputs, 0 for a bias; None if the
        tensor has the shape `param_shape`.
    """

    name: str
    parameter: str
    layer: int | None
    param_shape: tuple[int, ...]
    input_axes: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the Hugging Face checkpoint."""
        if self.input_axes is None:
            return self.param_shape
        inputs, outputs = self._split_shape()
        return (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)

    def put(self, tensor: np.ndarray, parameter: np.ndarray) -> None:
        """Writes the tensor into `parameter`, cast to its dtype."""
        inputs, outputs = self._split_shape()
        self._view(parameter)[...] = _axes_to_end(tensor.reshape(outputs + inputs), len(outputs))

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """Returns the tensor from `parameter`; a view where the memory layouts allow it."""
        return _axes_to_end(self._view(parameter), self.input_axes or 0).reshape(self.shape)

    def _split_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the sizes of the parameter's input axes, and those of its output axes."""
        count = self.input_axes or 0
        return self.param_shape[:count], self.param_shape[count:]

    def _view(self, parameter: np.ndarray) -> np.ndarray:
        return parameter[... if self.layer is None else self.layer]


def _axes_to_end(x: np.ndarray, count: int) -> np.ndarray:
    """Moves the first `count` axes behind the others."""
    return x.transpose(*range(count, x.ndim), *range(count))


def llama_tensors(params: Any) -> list[LlamaTensor]:
    """Lists the tensors of a model with these parameters, layer by layer."""
    shapes = {name: x.shape for name, x in by_name(params).items()}
    outer = {
        parameter: LlamaTensor(name, parameter, None, shapes[parameter], input_axes)
        for parameter, (name, input_axes) in _OUTER_TENSORS.items()
        # A model with tied embeddings has no output embedding.
        if parameter in shapes
    }
    layers = [
        LlamaTensor(f"model.layers.{i}.{name}", parameter, i, shapes[parameter][1:], input_axes)
        for i in range(shapes["layers.attention_norm"][0])
        for parameter, (name, input_axes) in _LAYER_TENSORS.items()
        if parameter in shapes
    ]
    return [outer.pop("embedding"), *layers, *outer.values()]


def abstract_params(model: ModelConfig) -> Any:
    """Returns a model's parameters as shapes, on one CPU."""
    layout = make_layout(Config(model=model), jax.devices("cpu")[:1])
    return LanguageModel.build(model, layout).abstract_params


def by_name(params: Any) -> dict[str, Any]:
    """Returns the parameters by dotted name, such as `"layers.mlp.gate"`, in tree order."""
    return {name.removesuffix(".value"): x for name, x in named_leaves(params).items()}
