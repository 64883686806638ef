"""The loss of training and evaluation: next-token cross-entropy."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lucid_jax.config import Config
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.transformer import Transformer
from lucid_jax.ops.cross_entropy import token_losses, token_margins
from lucid_jax.ops.precondition.diagnostics import Sample, sampled_rows

Batch = dict[str, jax.Array]


def weighted_losses(
    config: Config,
    model: LanguageModel,
    params: Any,
    batch: Batch,
    *,
    telemetry: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the weighted negative log-likelihood of every target.

    Its gradient is that of what training minimises, with `optim.z_loss`.

    Args:
      batch: `tokens`, `targets`, `segment_ids`, `positions` int32 and `weights` float32,
        each `[B,S]`.
      telemetry: Whether to measure the layers too.

    Returns:
      float32 `[B,S]` in nats, and the model's telemetry, empty unless asked for.
    """
    transformer, x, measured = _run_model(config, model, params, batch, telemetry)
    op = functools.partial(token_losses, z_loss=config.optim.z_loss)
    return _per_target(op, config, transformer, x, batch) * batch["weights"], measured


def losses_and_margins(
    config: Config, model: LanguageModel, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Computes `weighted_losses`, and how far each target's logit is below the largest.

    The arguments are those of `weighted_losses`; both results are float32 `[B,S]`.
    """
    transformer, x, _ = _run_model(config, model, params, batch, telemetry=False)
    losses, margins = (
        _per_target(op, config, transformer, x, batch) for op in (token_losses, token_margins)
    )
    return losses * batch["weights"], margins


def _run_model(
    config: Config, model: LanguageModel, params: Any, batch: Batch, telemetry: bool
) -> tuple[Transformer, jax.Array, dict[str, jax.Array]]:
    """Returns the model, its hidden states `[B,S,E]` and its telemetry."""
    transformer = model.merge(params)
    segment_ids: jax.Array | None = batch["segment_ids"]
    if config.data.packing == "document":
        # Only the padding at the end has another id. Causality hides it from every token, and a
        # library may have a faster kernel without ids.
        segment_ids = None
    rows = sampled_rows(config.data.sequence_length)
    sample = Sample(rows, batch["segment_ids"]) if telemetry else None
    x, measured = transformer(batch["tokens"], batch["positions"], segment_ids, sample=sample)
    return transformer, x, measured


def _per_target(
    op: Callable[..., jax.Array], config: Config, model: Transformer, x: jax.Array, batch: Batch
) -> jax.Array:
    """Applies an op of `cross_entropy` to every target, `[B,S]`."""
    # shard_map gathers the head, and reduces its gradient, once rather than for every chunk.
    axes = ("batch", "sequence")
    chunked = functools.partial(op, chunk=config.loss_chunk, axis=model.layout.mesh_axis("vocab"))
    return model.layout.shard_map(chunked, ((*axes, None), (None, "vocab"), axes), axes)(
        x, model.head, batch["targets"]
    )


def micro_batches(batch: Batch, count: int) -> Batch:
    """Splits each `[B,S]` array into `[count,B/count,S]`.

    Micro-batch `i` takes sequences `i, i + count, …`, so every device already holds its share
    of each micro-batch and nothing moves between devices.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
