"""Fine-tunes the paper's 1B model to 65,536 tokens: 500 steps of 16 sequences, RoPE base 64,000.

    python run.py --config=configs/paper/long_64k.py:lucid \\
        --config.data.train='/data/long/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

Like `long_32k`, from pretraining too, at twice the length.
"""

from configs.common import at_size
from configs.paper.recipe import fine_tuning, split


def get_config(argument: str = "lucid"):
    variant, size = split(argument)
    config = fine_tuning(variant, after="pretrain")
    config.data.sequence_length = 65_536
    return at_size(config, size)
