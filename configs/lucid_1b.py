"""Pretrains LUCID with 1.1 billion parameters at 2048 tokens.

    python run.py --config=configs/lucid_1b.py --workdir=runs/lucid_1b \\
        --config.data.train='/data/dolma/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

The optimiser and the batches are those of the paper (`configs/paper/pretrain.py`). Two things
differ: heads are 64 wide, as in TinyLlama, because kernels pad the paper's 68 to 80 or 128; and the
run is longer, 100,000 steps or 52 billion tokens instead of 11,000 steps. Write the corpus with
`python -m lucid_jax.data.tokenize` first.

The file is set for 16 devices, each with 16 sequences at a time; with more, each device has
fewer. With fewer devices, add accumulation to keep 16 sequences on each:

    1 device: --config.accumulation=16
    4 devices: --config.accumulation=4
    8 devices: --config.accumulation=2

On GPUs of 80 GB also add `--config.model.remat=dots`. One H200 then trains 71,000 tokens a
second on packed documents of 600 tokens (experiments/model_step).

A smoke test of the same code takes seconds on 1, 2, 3, 4, 6 or 8 devices and needs no data:

    python run.py --config=configs/lucid_1b.py:smoke
"""

from configs.common import at_size, base


def get_config(size: str = "full"):
    return at_size(base(), size)
