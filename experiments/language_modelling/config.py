"""A model of 34 million parameters on English technical text, in three kinds of runs.

    python -m experiments.language_modelling.corpus --output=runs/debian
    python run.py --config=experiments/language_modelling/config.py:2048 --workdir=runs/lm
    python run.py --config=experiments/language_modelling/config.py:16384 \\
        --workdir=runs/lm_16384 --config.checkpoint.init_from=runs/lm
    python run.py --config=experiments/language_modelling/config.py:dropin \\
        --workdir=runs/lm_dropin --config.checkpoint.init_from=runs/lm

`:2048` pretrains; `:16384` trains on a tenth of the tokens at that length; `:dropin` trains on a
tenth at the pretraining length, for a model that changes its attention. Softmax attention is
`--config.model.attention=softmax`. `study.py` runs them all.
"""

from configs.common import base
from lucid_jax.config import ConfigError

_TOKENS = 2**15  # Of a step.


def get_config(kind: str = "2048"):
    """Returns the configuration of a kind of run."""
    config = base()
    config.model.update(
        vocab_size=8192, num_layers=8, embed_dim=512, mlp_dim=1408, num_heads=8, num_kv_heads=8,
        head_dim=64, remat="none",
    )  # fmt: skip
    config.optim.update(learning_rate=1e-3, b2=0.95, eps=1e-8)
    config.data.update(tokenizer="runs/debian/tokenizer.json", packing="document")
    length = 2048
    if kind == "2048":
        config.steps = 2000
    elif kind == "16384":
        length = 16384
        config.steps = 200
        config.optim.learning_rate = 3e-4
        config.model.update(rope_scaling="ntk", rope_factor=8.0)
    elif kind == "dropin":
        config.steps = 200
        config.optim.learning_rate = 2e-4
    else:
        raise ConfigError(f"after the colon must be 2048, 16384 or dropin; got {kind!r}")
    config.batch_size = _TOKENS // length
    config.data.sequence_length = length
    config.data.train = f"arrayrecord:runs/debian/train-{length}"
    config.data.eval = f"arrayrecord:runs/debian/heldout-{length}"
    # More batches than the held-out text has, some 0.7 million tokens.
    config.eval_batches = 100
    config.eval_every = config.checkpoint.every = config.steps
    config.log_every = 20
    config.telemetry = False
    return config
