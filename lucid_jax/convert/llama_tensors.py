"""Maps the tensors of a Llama checkpoint to the parameters of a `Transformer`.

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
# inputs of its matrix product; 0 if it is no matrix of a product.
_OUTER_TENSORS = {
    "embedding": ("model.embed_tokens.weight", 0),
    "final_norm": ("model.norm.weight", 0),
    "output": ("lm_head.weight", 1),
}
_LAYER_TENSORS = {
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
    """A Hugging Face tensor and its place in our parameters.

    Attributes:
      parameter: The parameter's name, such as `"layers.mlp.gate"`.
      layer: The tensor's index along the parameter's first axis; None if it is all of it.
      param_shape: The tensor's shape in the parameter, inputs first.
      input_axes: How many leading axes of `param_shape` are inputs; 0 if it is no matrix.
    """

    name: str
    parameter: str
    layer: int | None
    param_shape: tuple[int, ...]
    input_axes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the Hugging Face checkpoint."""
        if not self.input_axes:
            return self.param_shape
        inputs, outputs = self.param_shape[: self.input_axes], self.param_shape[self.input_axes :]
        return math.prod(outputs), math.prod(inputs)

    def put(self, tensor: np.ndarray, parameter: np.ndarray) -> None:
        """Writes the tensor into `parameter`, cast to its dtype."""
        inputs, outputs = self.param_shape[: self.input_axes], self.param_shape[self.input_axes :]
        self._view(parameter)[...] = _axes_to_end(tensor.reshape(outputs + inputs), len(outputs))

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """Returns the tensor from `parameter`; a view where the memory layouts allow it."""
        return _axes_to_end(self._view(parameter), self.input_axes).reshape(self.shape)

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
        # With tied embeddings there is no output embedding.
        if parameter in shapes
    }
    layers = [
        LlamaTensor(f"model.layers.{i}.{name}", parameter, i, shapes[parameter][1:], input_axes)
        for i in range(shapes["layers.attention_norm"][0])
        for parameter, (name, input_axes) in _LAYER_TENSORS.items()
    ]
    return [outer.pop("embedding"), *layers, *outer.values()]


def abstract_params(model: ModelConfig) -> Any:
    """Returns a model's parameters as shapes, on one CPU."""
    layout = make_layout(Config(model=model), jax.devices("cpu")[:1])
    return LanguageModel.build(model, layout).abstract_params


def by_name(params: Any) -> dict[str, Any]:
    """Returns the parameters by dotted name, such as `"layers.mlp.gate"`, in tree order."""
    return {name.removesuffix(".value"): x for name, x in named_leaves(params).items()}
