"""AdamW and the schedules of its learning rate, from optax."""

import re
from typing import Any

import jax
import optax

from lucid_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the schedule: up from 0 over `warmup·steps`, then as `config.schedule` says."""
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    # A decay needs a step of its own, even if the whole run is warm-up.
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_ratio)
    elif config.schedule == "wsd":
        decay = min(max(round(config.decay * steps), 1), rest)
        after = optax.linear_schedule(peak, peak * config.final_ratio, decay, rest - decay)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Returns clipping by global norm, then AdamW; scales of norms and biases do not decay."""
    schedule = learning_rate(config, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            # Optax counts from 0, where the rate is 0: the first update takes the rate of step 1.
            lambda count: schedule(count + 1),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decays,
        ),
    )


def _decays(params: Any) -> Any:
    """Returns for each parameter whether weight decay applies to it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not re.search("norm|bias", jax.tree_util.keystr(path)), params
    )
