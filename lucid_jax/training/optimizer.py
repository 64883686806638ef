"""AdamW with linear warm-up and cosine decay, from optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lucid_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Step to learning rate: up from 0 over `warmup·steps`, then a cosine to `final_ratio`."""
    warmup = round(config.warmup * steps)
    decay = optax.cosine_decay_schedule(
        config.learning_rate, max(1, steps - warmup), config.final_ratio
    )
    if not warmup:
        return decay
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW; the scales of norms do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            # Step n is the n-th update: the first one is not spent on a rate of zero.
            lambda count: learning_rate(config, steps)(count + 1),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decays,
        ),
    )


def _decays(params: Any) -> Any:
    def is_kernel(path, _):
        return "norm" not in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(is_kernel, params)
