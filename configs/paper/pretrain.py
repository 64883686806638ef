"""Pretrains the paper's 1B model (arXiv 2602.10410): 5.8 billion tokens of Dolma.

    python run.py --config=configs/paper/pretrain.py:lucid \\
        --config.data.train='/data/dolma/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

11,000 steps of 256 sequences of 2048 tokens. For variants and sizes see `recipe.py`; the file is
set for 16 devices, and `configs/lucid_1b.py` lists what to add for other numbers.
"""

from configs.common import at_size
from configs.paper.recipe import pretraining, split


def get_config(argument: str = "lucid"):
    variant, size = split(argument)
    return at_size(pretraining(variant), size)
