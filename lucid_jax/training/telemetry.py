"""Measurements of the LUCID layers while a run trains."""

from collections.abc import Callable
from typing import Any

import jax

from lucid_jax.config import Config
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.loss import Batch, micro_batches, weighted_losses


def make_telemetry(
    config: Config, model: LanguageModel
) -> Callable[[Any, Batch], dict[str, list[float]]]:
    """Returns a function of parameters and batch that measures every LUCID layer.

    It runs one forward pass on one micro-batch and returns lists by layer: `off_diagonal`, the
    largest entry of `A` below its diagonal, and `value_gain`, the largest `‖y‖/‖v‖` of a head,
    at most 2. It returns {} if `config.telemetry` is off or the model has no LUCID layer.
    """
    lucid = [i for i, kind in enumerate(config.model.layer_kinds) if kind == "lucid"]

    @jax.jit
    def measure(params, batch):
        # The whole batch may not fit into memory.
        micro = jax.tree.map(lambda x: x[0], micro_batches(batch, config.accumulation))
        _, measured = weighted_losses(config, model, params, micro, telemetry=True)
        return measured

    def telemetry(params: Any, batch: Batch) -> dict[str, list[float]]:
        if not (config.telemetry and lucid):
            return {}
        measured = jax.device_get(measure(params, batch))
        return {name: [float(x[i]) for i in lucid] for name, x in measured.items()}

    return telemetry
