"""One optimiser step: gradients over micro-batches, clipping, AdamW, in one donated jit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lucid_jax.config import Config
from lucid_jax.models.loss import Batch, micro_batches, weighted_losses
from lucid_jax.models.transformer import abstract_model, init_params
from lucid_jax.parallel.mesh import Layout
from lucid_jax.training.optimizer import learning_rate, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: float32 parameters.
      opt_state: The state of optax, sharded as the parameters are.
    """

    step: Any
    params: Any
    opt_state: optax.OptState


def abstract_state(config: Config, layout: Layout) -> TrainState:
    """The shapes and shardings of the state."""
    _, params = abstract_model(config.model, layout)
    replicated = layout.sharding()
    optimizer = make_optimizer(config.optim, config.steps)
    # The moments are shaped as the parameters and lie as they do.
    opt_state = optax.tree.map_params(
        optimizer,
        lambda x, param: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    )
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), params, opt_state)


def init_state(config: Config, layout: Layout, params: Any | None = None) -> TrainState:
    """Step 0, with random parameters unless some are given."""
    if params is None:
        params = init_params(config.model, layout, config.seed)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, layout))
    optimizer = make_optimizer(config.optim, config.steps)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, opt_state)


def make_train_step(config: Config, graph: nnx.GraphDef, layout: Layout) -> jax.stages.Wrapped:
    """The jitted step; its state argument is donated.

    It returns the new state and scalars: `loss` (mean over the weights of the whole
    batch, nats), `grad_norm` (before clipping), `learning_rate`, `tokens` (the sum of
    weights) and `finite`. Where loss or gradient norm is not finite the state keeps its
    values, so that no checkpoint ever holds what came of them.
    """
    optimizer = make_optimizer(config.optim, config.steps)
    schedule = learning_rate(config.optim, config.steps)

    def loss_sum(params, micro):
        losses, _ = weighted_losses(config, graph, params, micro)
        return losses.sum()

    def gradients(params, batch):
        if config.accumulation == 1:
            return jax.value_and_grad(loss_sum)(params, batch)

        def add(total, micro):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_sum)(params, micro)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zero, micro_batches(batch, config.accumulation))[0]

    def step(state: TrainState, batch: Batch):
        tokens = batch["weights"].sum()
        # PartialSoftmax over all micro-batches, then one division: rows with fewer tokens count less.
        nats, grads = gradients(state.params, batch)
        scale = 1 / jnp.maximum(tokens, 1)
        loss, grads = nats * scale, jax.tree.map(lambda g: g * scale, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(state.step + 1, params, opt_state)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step + 1),
            "tokens": tokens,
            "finite": finite,
        }
        return new_state, metrics

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, layout))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.sharding()))
