"""Fine-tunes the paper's 1B model on half of 2WikiMQA and half of MultifieldQA: 3 epochs at 5e-6.

    python run.py --config=configs/paper/longbench.py:lucid \\
        --config.data.train='2wikimqa.jsonl@100, multifieldqa.jsonl@75' \\
        --config.data.tokenizer=/data/llama.model

`python -m experiments.paper_tables.training_data` writes each half, of prompts and completions; the
completions alone are trained on. LongBench has 200 and 150 questions, so three epochs of the halves
in steps of 16 are 33 steps. The length, and that it starts from `long_32k`, are our choice.
"""

from configs.common import at_size
from configs.paper.recipe import fine_tuning, split


def get_config(argument: str = "lucid"):
    variant, size = split(argument)
    config = fine_tuning(variant, after="long_32k")
    config.steps = 33
    config.optim.learning_rate = 5e-6
    config.data.update(sequence_length=32_768, packing="document")
    return at_size(config, size)
