"""LUCID, 1.1 billion parameters, pretraining at 2048 tokens (arXiv 2602.10410).

    python run.py --config=configs/lucid_1b.py --workdir=runs/lucid_1b \\
        --config.data.train='/data/dolma/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

The paper's setting: the shape of TinyLlama, a tokenizer of 32000 pieces, AdamW at
5e-4 with β2 0.99 and ε 1e-12, 6% warm-up, cosine decay, weight decay 0.01, 256 rows
a step. The number of steps, 100,000, is ours: 52 billion tokens. Write the corpus with
`python -m lucid_jax.data.tokenize` first.

It is set for 16 devices, with 16 rows on each at a time. On more the rows are spread;
for the same number on fewer, add

    1 device: --config.accumulation=16
    4 devices: --config.accumulation=4
    8 devices: --config.accumulation=2

On a GPU of 80 GB also add `--config.model.remat=dots`: 68,000 tokens a second on one H200,
with rows of one document (`--config.data.packing=document`).

A smoke test of the same code in seconds, on 1, 2, 3, 4, 6 or 8 devices, without data of
one's own:

    python run.py --config=configs/lucid_1b.py:smoke
"""

from configs.common import at_size, base


def get_config(size: str = "full"):
    config = base()
    config.checkpoint.every = 1000
    config.eval_every = 1000
    return at_size(config, size)
