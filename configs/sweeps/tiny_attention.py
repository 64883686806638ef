"""Compares LUCID and softmax attention on the tiny model, at two learning rates each.

python run.py --config=configs/tiny.py --mode=sweep --sweep=configs/sweeps/tiny_attention.py
"""


def get_trials():
    return [
        {"model.attention": attention, "optim.learning_rate": rate}
        for attention in ("lucid", "softmax")
        for rate in (1e-3, 3e-3)
    ]
