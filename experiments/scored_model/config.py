"""A byte-level LUCID model of 5 million parameters that retrieves: RULER's samples by bytes.

    python -m experiments.scored_model.samples --output=runs/ruler/train.jsonl --count=200000
    python -m lucid_jax.data.tokenize --input=runs/ruler/train.jsonl --tokenizer=bytes \\
        --output=runs/ruler/tokens
    python run.py --config=experiments/scored_model/config.py --workdir=runs/scored_model
    python run.py --config=experiments/scored_model/config.py --workdir=runs/scored_model \\
        --mode=eval --tasks=ruler_niah_single_1,ruler_niah_multikey_1 --lengths=768,1024

The softmax baseline is `--config.model.attention=softmax`. Training takes minutes on one GPU.
"""

from configs.common import base


def get_config():
    """Returns the configuration."""
    config = base()
    config.steps = 4500
    config.batch_size = 32
    config.eval_every = config.checkpoint.every = 1500
    config.eval_batches = 8
    config.log_every = 100
    config.telemetry = False
    config.checkpoint.update(keep_last=1, keep_best=0)
    config.model.update(
        vocab_size=258, num_layers=6, embed_dim=256, mlp_dim=768, num_heads=4, num_kv_heads=4,
        head_dim=64, init_std=0.05, remat="none",
    )  # fmt: skip
    config.data.update(
        train="arrayrecord:runs/ruler/tokens", eval="arrayrecord:runs/ruler/tokens", holdout=0.01,
        sequence_length=1024, packing="document",
    )  # fmt: skip
    config.optim.update(learning_rate=1e-3, b2=0.98, eps=1e-8, warmup=0.03)
    return config
