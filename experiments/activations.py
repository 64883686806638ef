"""Queries, keys and values of every layer of a trained model."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lucid_jax.checkpoint.restore import restore_params
from lucid_jax.checkpoint.restore import saved_config as read_saved_config
from lucid_jax.config import Config, ConfigError
from lucid_jax.models.attention import ShardedAttention
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout


class Activations(NamedTuple):
    """Arrays after RoPE, stacked over layers: `q [L,B,S,H,D]`, `k` and `v [L,B,S,K,D]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class Trained(NamedTuple):
    """A trained model: configuration, structure and parameters."""

    config: Config
    model: LanguageModel
    params: Any

    @classmethod
    def load(cls, workdir: str | os.PathLike) -> Trained:
        """Loads the newest sound checkpoint of a work directory, to compute in float32.

        Raises:
          ConfigError: queries, keys and values alone do not determine the attention of the model.
        """
        saved = read_saved_config(workdir)
        saved["model"] = {**saved["model"], "compute_dtype": "float32"}
        # One device holds the model, however many trained it.
        saved["mesh"] = {**saved["mesh"], "data": 1, "fsdp": 1, "tensor": 1, "context": 1}
        config = Config.from_dict(saved)
        if config.model.positions == "path" or config.model.lucid_beta:
            raise ConfigError(
                f"{workdir} has transitions or a learnt β, which this experiment does not know:"
                " expected model.positions of rope or none, and no model.lucid_beta"
            )
        model = build_model(config)
        return cls(config, model, restore_params(workdir, model.abstract_params)[1])

    def without_inverse(self, layer: int) -> Trained:
        """Returns the model with one LUCID layer turned into a softmax layer."""
        if (temperature := self.config.model.temperature) != 1:
            # It applies to softmax layers only, so more than the inverse would differ.
            raise ValueError(f"the model has a temperature of {temperature}; expected 1")
        kinds = list(self.config.model.layer_kinds)
        kinds[layer] = "softmax"
        model = dataclasses.replace(self.config.model, attention=",".join(kinds))
        config = dataclasses.replace(self.config, model=model)
        return Trained(config, build_model(config), self.params)


def build_model(config: Config) -> LanguageModel:
    """Builds the model for one device, however many there are."""
    return LanguageModel.build(config.model, make_layout(config, jax.devices()[:1]))


@functools.partial(jax.jit, static_argnums=0)
def activations(model: LanguageModel, params: Any, tokens: jax.Array) -> Activations:
    """Runs a model over int32 `tokens [B,S]`, one document a sequence."""
    attention = ShardedAttention(model.config, model.layout)
    transformer = model.merge(params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rotations = transformer.rotations(positions)
    structure, stacked = nnx.split(transformer.layers)

    def layer(x, scanned):
        state, index = scanned

        def attend(inputs):
            o, _ = attention.attend(inputs, None, index)
            return o, Activations(inputs.q, inputs.k, inputs.v)

        return nnx.merge(structure, state)(x, rotations, attend)

    layers = stacked, jnp.arange(model.config.num_layers)
    with jax.default_matmul_precision("highest"):  # Never tf32.
        return jax.lax.scan(layer, transformer.embed(tokens), layers)[1]
