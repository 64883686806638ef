"""Weight decay reaches the matrices and the embedding alone."""

import jax
import jax.numpy as jnp
import numpy as np
import toy
from small_models import random_params, small

from lucid_jax.config import OptimConfig
from lucid_jax.convert.llama_tensors import by_name
from lucid_jax.training.optimizer import make_optimizer


def test_norms_and_biases_do_not_decay():
    params = random_params(toy.model_of(small(attention_bias=True, qk_norm="rms")))
    optimizer = make_optimizer(OptimConfig(warmup=0.0), steps=1)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    kept = {name.split(".")[-1] for name, update in by_name(updates).items() if not np.any(update)}
    assert kept == {
        "attention_norm", "mlp_norm", "final_norm", "query_norm", "key_norm",
        "query_bias", "key_bias", "value_bias",
    }  # fmt: skip
