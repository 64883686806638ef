"""One optimiser step: gradients over micro-batches, clipping and AdamW in one donated jit."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lucid_jax.config import Config
from lucid_jax.data.packing import FIELDS
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.loss import Batch, micro_batches, weighted_losses
from lucid_jax.training.optimizer import learning_rate, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The number of steps done, the float32 parameters and optax's state, which a step changes.

    The state of the optimiser is sharded like the parameters.
    """

    step: Any
    params: Any
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A model and its optimiser, which make the training state and the training step.

    `abstract_state` has the shapes, dtypes and shardings of the state.
    """

    config: Config
    model: LanguageModel
    optimizer: optax.GradientTransformation = dataclasses.field(compare=False)
    abstract_state: TrainState = dataclasses.field(compare=False)

    @classmethod
    def build(cls, config: Config, model: LanguageModel) -> Self:
        """Traces the optimiser; nothing is allocated."""
        params, replicated = model.abstract_params, model.layout.sharding()
        optimizer = make_optimizer(config.optim, config.steps)
        # The moments have the shapes and shardings of the parameters.
        opt_state = optax.tree.map_params(
            optimizer,
            lambda x, param: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=param.sharding),
            jax.eval_shape(optimizer.init, params),
            params,
            transform_non_params=lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=replicated
            ),
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        return cls(config, model, optimizer, TrainState(step, params, opt_state))

    @property
    def shardings(self) -> TrainState:
        """The shardings of the state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes, dtypes and shardings of a batch."""
        layout = self.model.layout
        size = layout.stripes(self.config.data.sequence_length).size
        sharding = layout.sharding("batch", "sequence")
        return {
            name: jax.ShapeDtypeStruct((self.config.batch_size, size), dtype, sharding=sharding)
            for name, dtype in FIELDS.items()
        }

    def init_state(self, params: Any | None = None) -> TrainState:
        """Returns the state of step 0, with `params` or else random parameters."""
        if params is None:
            params = self.model.init(self.config.seed)
        init = jax.jit(self.optimizer.init, out_shardings=self.shardings.opt_state)
        return TrainState(jax.device_put(jnp.int32(0), self.shardings.step), params, init(params))

    def make_step(self) -> jax.stages.Wrapped:
        """Returns the jitted step `(state, batch) -> (state, metrics)`; it donates the state.

        The metrics are scalars: `loss` (mean over the targets of the batch, in nats), `grad_norm`
        (before clipping), `learning_rate`, `tokens` (those that are not padding), `pairs` (of a
        token and one of its document that it sees) and `finite`; and, with `config.telemetry`,
        the model's telemetry of the LUCID layers. If the loss or the gradient norm is not finite,
        the state keeps its values, so that no checkpoint ever holds the result.
        """
        config, model = self.config, self.model
        schedule = learning_rate(config.optim, config.steps)

        lucid = np.array([kind == "lucid" for kind in config.model.layer_kinds])
        measures = config.telemetry and bool(lucid.any())

        def loss_sum(params, micro):
            losses, measured = weighted_losses(config, model, params, micro, telemetry=measures)
            return losses.sum(), {name: x[lucid] for name, x in measured.items()}

        value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)

        def gradients(params, batch):
            if config.accumulation == 1:
                return value_and_grad(params, batch)

            def add(total, micro):
                (nats, measured), grads = value_and_grad(params, micro)
                return jax.tree.map(jnp.add, total, (nats, grads)), measured

            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
            micro = micro_batches(batch, config.accumulation)
            (nats, grads), measured = jax.lax.scan(add, zero, micro)
            return (nats, jax.tree.map(lambda x: x.max(0), measured)), grads

        def step(state: TrainState, batch: Batch):
            # One division after summing all micro-batches, so that every target counts the same.
            (nats, measured), grads = gradients(state.params, batch)
            scale = 1 / jnp.maximum(batch["weights"].sum(), 1)
            is_token = batch["segment_ids"] != 0
            loss, grads = nats * scale, jax.tree.map(lambda g: g * scale, grads)
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            new_state = TrainState(state.step + 1, params, opt_state)
            new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
            metrics = {
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": schedule(state.step + 1),
                "tokens": is_token.sum(),
                "pairs": jnp.where(is_token, batch["positions"] + 1.0, 0).sum(),
                "finite": finite,
                **measured,
            }
            return new_state, metrics

        metrics_sharding = model.layout.sharding()
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, metrics_sharding))
