"""A byte-level LUCID model of 10.8 million parameters that retrieves: RULER's samples by bytes.

    python -m experiments.scored_model.samples --output=runs/ruler/train.jsonl
    python run.py --config=experiments/scored_model/config.py --workdir=runs/scored_model
    python run.py --config=experiments/scored_model/config.py --workdir=runs/scored_model \\
        --mode=eval --tasks=ruler_niah_single_1,ruler_niah_multikey_1,ruler_vt --lengths=1024,2048

`--config.model.attention=softmax` for the baseline. On one H200 the training is meant to take
eight minutes.
"""

from configs.common import base


def get_config():
    """See above."""
    config = base()
    config.steps = 20_000
    config.batch_size = 32
    config.eval_every = config.checkpoint.every = 2000
    config.eval_batches = 8
    config.log_every = 100
    config.model.update(
        vocab_size=258, num_layers=6, embed_dim=384, mlp_dim=1024, num_heads=6, num_kv_heads=6,
        head_dim=64, remat="none",
    )  # fmt: skip
    config.data.update(
        train="runs/ruler/train.jsonl", eval="runs/ruler/train.jsonl", holdout=0.01,
        sequence_length=2048, packing="document", read_threads=4,
    )  # fmt: skip
    config.optim.update(learning_rate=1e-3, b2=0.98, eps=1e-8, warmup=0.02)
    return config
