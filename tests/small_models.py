"""Models small enough to decode in seconds; decoding and generation share them."""

import jax
import numpy as np

from lucid_jax.config import Config
from lucid_jax.models.language_model import LanguageModel

SMALL = {
    "batch_size": 4,
    "model": {
        "vocab_size": 64, "num_layers": 2, "embed_dim": 32, "mlp_dim": 48, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "compute_dtype": "float32", "remat": "none",
    },
}  # fmt: skip
# Beside grouped heads: one key/value head of its own for each query, and one for all.
MODELS = {
    "lucid": {},
    "pattern": {"attention": "softmax,lucid", "tie_embeddings": True, "temperature": 0.7},
    "every head": {
        "attention": "softmax", "num_kv_heads": 4, "rope_scaling": "linear", "rope_factor": 4.0,
    },
    "one head": {"num_kv_heads": 1, "head_dim": 6, "implementation": "reference"},
}  # fmt: skip


def small(**model) -> Config:
    return Config.from_dict({**SMALL, "model": {**SMALL["model"], **model}})


def random_params(model: LanguageModel):
    """Drawn by numpy, which compiles nothing; norms are near one."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        value = ("norm" in jax.tree_util.keystr(path)) + 0.2 * rng.normal(size=x.shape)
        return jax.device_put(value.astype(np.float32), x.sharding)

    return jax.tree.map_with_path(draw, model.abstract_params)
