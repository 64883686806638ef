"""Fine-tunes the paper's 1B model on BABILong at 32,768 tokens: two epochs at 5e-5.

    python run.py --config=configs/paper/babilong.py:lucid --config.steps=625 \\
        --config.data.train=babilong_32k.jsonl --config.data.tokenizer=/data/llama.model

`python -m experiments.paper_tables.training_data` writes the file, of prompts and completions; the
completions alone are trained on. Two epochs of N lines in steps of 16 are N/8 steps: 625 for 5000.
The paper gives epochs and rate for LUCID-PaTH (`:lucid_path`). That all variants have the same, and
start from `long_32k`, is our choice. Evaluate with
`python -m experiments.paper_tables.run --table=babilong`.
"""

from configs.common import at_size
from configs.paper.recipe import fine_tuning, split


def get_config(argument: str = "lucid"):
    variant, size = split(argument)
    config = fine_tuning(variant, after="long_32k")
    config.steps = 625
    config.data.update(sequence_length=32_768, packing="document")
    return at_size(config, size)
