"""A model's structure on its mesh, built once and passed to everything that needs it."""

import dataclasses
import functools
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from lucid_jax.config import ModelConfig
from lucid_jax.models.transformer import Transformer
from lucid_jax.parallel.mesh import Layout


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The structure of a `Transformer`, without its parameters.

    `merge` fills the definition `graph` with parameters; `abstract_params` has the shape, dtype
    and sharding of each.
    """

    config: ModelConfig
    layout: Layout
    graph: nnx.GraphDef = dataclasses.field(compare=False)
    abstract_params: Any = dataclasses.field(compare=False)

    @classmethod
    def build(cls, config: ModelConfig, layout: Layout) -> Self:
        """Traces the model without allocating its parameters."""
        model = nnx.eval_shape(lambda: Transformer(config, layout, nnx.Rngs(params=0)))
        graph, params = nnx.split(model, nnx.Param)

        def with_sharding(variable):
            value = variable.get_value()
            sharding = layout.sharding(*variable.axes)
            return variable.replace(
                jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
            )

        params = jax.tree.map(with_sharding, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return cls(config, layout, graph, params)

    def init(self, seed: int) -> Any:
        """Draws random parameters, each shard on its own device."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_params)
        platform = self.layout.mesh.devices.flat[0].platform
        # A CPU's compiler takes four times as long at its default level, for the same bits.
        options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None

        @functools.partial(jax.jit, out_shardings=shardings, compiler_options=options)
        def init():
            model = Transformer(self.config, self.layout, nnx.Rngs(params=seed))
            return nnx.state(model, nnx.Param)

        return init()

    def merge(self, params: Any) -> Transformer:
        """Returns the callable model with these parameters."""
        return nnx.merge(self.graph, params)

    @property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.abstract_params))
