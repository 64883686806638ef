"""Trains a byte-level LUCID model of 0.8 million parameters on the Python standard library.

    python run.py --config=configs/tiny.py

It needs no download and no accelerator, and takes about two minutes on 2 CPU cores.
"""

from configs.common import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 8
    config.log_every = 10
    config.eval_every = 100
    config.eval_batches = 16
    config.loss_chunk = 256

    config.model.update(
        vocab_size=258,
        num_layers=4,
        embed_dim=128,
        mlp_dim=352,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        compute_dtype="float32",
        remat="none",
    )
    config.data.update(
        train="python-stdlib",
        eval="python-stdlib",
        holdout=0.05,
        sequence_length=256,
    )
    config.optim.update(learning_rate=3e-3, b2=0.95, eps=1e-8)
    config.checkpoint.every = 100
    return config
