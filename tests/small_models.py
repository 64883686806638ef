"""Small models for the tests of the model, decoding and generation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lucid_jax.config import Config
from lucid_jax.models.language_model import LanguageModel

SMALL = {
    "batch_size": 4,
    "loss_chunk": 16,
    "model": {
        "vocab_size": 64, "num_layers": 2, "embed_dim": 32, "mlp_dim": 48, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "compute_dtype": "float32", "remat": "none",
    },
}  # fmt: skip
# Query heads are grouped, have a KV head each, or one KV head for all.
MODELS = {
    "lucid": {},
    "pattern": {"attention": "softmax,lucid", "tie_embeddings": True, "temperature": 0.7},
    "every head": {
        "attention": "softmax", "num_kv_heads": 4, "rope_scaling": "linear", "rope_factor": 4.0,
    },
    "one head": {"num_kv_heads": 1, "head_dim": 6, "implementation": "reference"},
    "differential": {"attention": "differential", "num_kv_heads": 4, "num_heads": 8},
    "mixture": {
        "attention": "differential,lucid", "positions": "none", "qk_norm": "paper",
        "head_dim": 6,
    },
    "path": {"positions": "path", "attention": "lucid,softmax", "temperature": 0.7},
    "beta": {"attention": "lucid,softmax", "lucid_beta": True},
    "biases and norms": {"num_kv_heads": 1, "attention_bias": True, "qk_norm": "rms"},
}  # fmt: skip


def small(**model) -> Config:
    return Config.from_dict({**SMALL, "model": {**SMALL["model"], **model}})


def rest_slow(first, *others) -> list:
    """Returns test parameters, of which all but the first are slow."""
    return [first, *(pytest.param(x, marks=pytest.mark.slow) for x in others)]


def meshes(first: dict[str, int], *others: dict[str, int]) -> list:
    """Returns meshes as test parameters that need enough devices; all but the first are slow."""

    def param(mesh, *marks):
        count = math.prod(mesh.values())
        missing = pytest.mark.skipif(jax.device_count() < count, reason=f"needs {count} devices")
        return pytest.param(mesh, marks=(missing, *marks), id=str(mesh))

    return [param(first), *(param(mesh, pytest.mark.slow) for mesh in others)]


def random_params(model: LanguageModel):
    """Draws parameters with numpy, which compiles nothing; norm scales are near one."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        value = ("norm" in jax.tree_util.keystr(path)) + 0.2 * rng.normal(size=x.shape)
        return jax.device_put(value.astype(np.float32), x.sharding)

    return jax.tree.map_with_path(draw, model.abstract_params)


def hidden_states(model: LanguageModel):
    """Returns the jitted forward pass from parameters and tokens `[B,S]` to `[B,S,E]`."""

    @jax.jit
    def forward(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.merge(params)(tokens, positions, None)[0]

    return forward
