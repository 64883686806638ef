"""Fine-tunes the paper's 1B model to 32,768 tokens: 500 steps of 16 sequences, RoPE base 64,000.

    python run.py --config=configs/paper/long_32k.py:lucid \\
        --config.data.train='/data/long/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

The rate of 5e-5 is our choice. The file is set for 16 devices, each with one sequence; with 8, add
`--config.accumulation=2`.
"""

from configs.common import at_size
from configs.paper.recipe import fine_tuning, split


def get_config(argument: str = "lucid"):
    variant, size = split(argument)
    config = fine_tuning(variant, after="pretrain")
    config.data.sequence_length = 32_768
    return at_size(config, size)
