"""Pretrains the softmax baseline of `lucid_1b`: the same model, data and optimiser.

    python run.py --config=configs/softmax_1b.py --workdir=runs/softmax_1b \\
        --config.data.train='/data/dolma/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

The file is set for 16 devices; `lucid_1b` lists what to add for other numbers.

Another baseline lowers the temperature: `--config.model.temperature=0.5`.
"""

from configs.lucid_1b import get_config as lucid_1b


def get_config(size: str = "full"):
    config = lucid_1b(size)
    config.model.attention = "softmax"
    return config
