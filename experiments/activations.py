"""What the attention of a trained model reads: queries, keys and values of every layer."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lucid_jax.checkpoint import restore_params
from lucid_jax.checkpoint import saved_config as read_saved_config
from lucid_jax.config import Config
from lucid_jax.model import abstract_model
from lucid_jax.ops import rope
from lucid_jax.ops.norm import rms_norm
from lucid_jax.sharding import make_layout


class Activations(NamedTuple):
    """After RoPE, stacked over layers: `q [L,B,S,H,D]`, `k` and `v [L,B,S,K,D]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class Trained(NamedTuple):
    """A checkpoint: its configuration, the model's structure and its parameters."""

    config: Config
    graph: nnx.GraphDef
    params: Any

    @classmethod
    def load(cls, workdir: str | os.PathLike) -> Trained:
        """The newest sound checkpoint of a work directory, to compute in float32.

        Raises:
          CheckpointError: no sound checkpoint.
        """
        saved = read_saved_config(workdir)
        saved["model"] = {**saved["model"], "compute_dtype": "float32"}
        # One device holds it, however many trained it and there are.
        saved["mesh"] = {**saved["mesh"], "data": 1, "fsdp": 1, "tensor": 1, "context": 1}
        config = Config.from_dict(saved)
        graph, abstract = abstract_model(config.model, make_layout(config, jax.devices()[:1]))
        return cls(config, graph, restore_params(workdir, abstract)[1])


def activations(graph: nnx.GraphDef, params: Any, tokens: jax.Array) -> Activations:
    """Runs the model over rows of one document each, without rounding to tf32 on GPUs.

    Args:
      graph: Structure of the model.
      params: Its parameters.
      tokens: int32 `[B,S]`.
    """
    model = nnx.merge(graph, params)
    config = model.config
    frequencies = rope.frequencies(
        config.head_dim,
        config.rope_base,
        config.rope_scaling,
        config.rope_factor,
        config.rope_original_length,
    )
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rotations = rope.rotations(positions, frequencies)
    structure, stacked = nnx.split(model.layers)

    def layer(x, scanned):
        state, is_lucid = scanned
        block = nnx.merge(structure, state)
        normed = rms_norm(x, block.attention_norm[...], config.norm_eps)
        weights = block.attention.query, block.attention.key, block.attention.value
        q, k, v = (jnp.einsum("bse,ehd->bshd", normed, w.astype(x.dtype)) for w in weights)
        x, _ = block(x, rotations, None, is_lucid, False)
        return x, Activations(rope.rotate(q, *rotations), rope.rotate(k, *rotations), v)

    is_lucid = np.array([kind == "lucid" for kind in config.layer_kinds])
    x = model.embedding[...].astype(config.compute_dtype)[tokens]
    with jax.default_matmul_precision("highest"):
        return jax.lax.scan(layer, x, (stacked, jnp.asarray(is_lucid)))[1]
