"""Fine-tunes `lucid_1b` to 1,048,576 tokens, each sequence on 32 devices.

    python run.py --config=configs/lucid_1b_1m.py:v5p-4x4x8 --workdir=runs/lucid_1b_1m \\
        --config.checkpoint.init_from=runs/lucid_1b_128k \\
        --config.data.train='/data/long/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

The same as `lucid_1b_128k`, at eight times the length: 4 sequences a step, 4.2 million tokens.
The file is set for 128 devices, with 32768 tokens on each. With another number of devices, set
how many share a sequence:

    32 devices: --config.mesh.context=8
    64 devices: --config.mesh.context=16
    256 devices: --config.mesh.context=64

`:v5p-4x4x8` chooses the settings for that TPU slice, `:4gpu` those for four GPUs of 80 GB in one
host, which take one sequence at a time: 16 s and 66 GB for one of documents of 16,000 tokens,
measured without accumulation on H200s (experiments/model_step). With it the compiler counts
4.4 GB more. Give JAX all of the memory: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
"""

from configs.common import at_size
from configs.lucid_1b_128k import get_config as lucid_1b_128k

SLICES: dict[str, dict] = {"v5p-4x4x8": {"fsdp": 4, "context": 32, "remat": "dots"}}
GPUS: dict[str, dict] = {"4gpu": {"fsdp": 1, "context": 4, "accumulation": 4}}


def get_config(size: str = "full"):
    config = lucid_1b_128k()
    config.model.rope_factor = 512.0
    config.data.sequence_length = 1_048_576
    config.mesh.context = 32
    config.checkpoint.init_from = "runs/lucid_1b_128k"
    return at_size(config, size, SLICES | GPUS)
