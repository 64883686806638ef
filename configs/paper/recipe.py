"""The model, its variants and the optimiser, which all stages of the paper's recipe share.

A configuration of this folder takes the variant after a colon: `standard` (softmax),
`differential`, `lucid`, `path` or `lucid_path`; `lucid-smoke` is the same code at a toy size. Each
stage starts from the stage before it in the work directory that run.py chooses,
`runs/pretrain-lucid` and so on. The transitions of the last two take the place of RoPE, so that its
base means nothing to them.

The model has 1,113,024,512 parameters, 8,976 more with `differential`, 12,453,496 more with `path`
and `lucid_path`: 22 layers, width 2048, MLP 5632, 32/4 heads of 68, a vocabulary of 32,000. The
optimiser is AdamW with β 0.9 and 0.99, ε 1e-12, weight decay 0.01 and 6% warm-up, which are the
defaults of `lucid_jax/config.py`. The cosine decay to a tenth and the clipping are ours, and
products are in bfloat16 where the authors' scripts use float32
(`--config.model.compute_dtype=float32`).
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import base
from lucid_jax.config import ConfigError

VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {"attention": "softmax"},
    "differential": {"attention": "differential"},
    "lucid": {"attention": "lucid"},
    "path": {"attention": "softmax", "positions": "path"},
    "lucid_path": {"attention": "lucid", "positions": "path"},
}


def pretraining(variant: str) -> ConfigDict:
    """Returns the pretraining of a variant."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise ConfigError(
            f"the text after the colon must be one of {known}, or that and -smoke; got {variant!r}"
        )
    config = base()
    config.steps = 11_000
    config.batch_size = 256
    config.model.head_dim = 68
    config.model.update(VARIANTS[variant])
    config.data.sequence_length = 2048
    config.optim.learning_rate = 5e-4
    return config


def fine_tuning(variant: str, after: str) -> ConfigDict:
    """Returns fine-tuning of a variant after the stage of that name."""
    config = pretraining(variant)
    config.steps = 500
    config.batch_size = 16
    config.model.rope_base = 64_000.0
    config.optim.learning_rate = 5e-5
    config.eval_every = 100
    config.checkpoint.update(every=100, init_from=f"runs/{after}-{variant}")
    return config


def split(argument: str) -> tuple[str, str]:
    """Splits the text after the colon into the variant and the size, as `at_size` takes it."""
    variant, dash, size = argument.partition("-")
    return variant, size if dash else "full"
