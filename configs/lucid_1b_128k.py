"""Fine-tunes `lucid_1b` to 131072 tokens, four times the paper's 32K and twice its 64K.

    python run.py --config=configs/lucid_1b_128k.py --workdir=runs/lucid_1b_128k \\
        --config.checkpoint.init_from=runs/lucid_1b \\
        --config.data.train='/data/long/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

The same as `lucid_1b_32k`, at four times the length. The file is set for 4 devices, each with
one sequence. With one, split a step into micro-batches; with more, share sequences among
devices:

    1 device: --config.accumulation=4
    8 devices: --config.mesh.context=2
    16 devices: --config.mesh.context=4

On GPUs of 80 GB also add `--config.model.remat=attention`. One H200 then trains 45,900
tokens a second on packed documents of 4000 tokens, and 8,000 on documents of 131072
(experiments/model_step).

The settings for a TPU slice are chosen after the colon: `lucid_1b_128k.py:v5p-2x2x4`,
`:v6e-4x4`, `:v5e-8x8`.
"""

from configs.common import at_size
from configs.lucid_1b_32k import get_config as lucid_1b_32k

SLICES: dict[str, dict] = {
    "v5p-2x2x4": {"fsdp": 4, "context": 4, "remat": "dots"},
    "v6e-4x4": {"fsdp": 4, "context": 4},
    "v5e-8x8": {"fsdp": 4, "context": 16},
}


def get_config(size: str = "full"):
    config = lucid_1b_32k()
    config.batch_size = 4
    config.model.rope_factor = 64.0
    config.data.sequence_length = 131072
    return at_size(config, size, SLICES)
