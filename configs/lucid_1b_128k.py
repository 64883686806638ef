"""`lucid_1b` fine-tuned to 131072 tokens (arXiv 2602.10410, long-context setting).

    python run.py --config=configs/lucid_1b_128k.py --workdir=runs/lucid_1b_128k \\
        --config.checkpoint.init_from=runs/lucid_1b \\
        --config.data.train='/data/long/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

500 steps at 5e-5. The rotary base grows with the length (the "ntk" rule), so that the
fastest rotations, which tell neighbours apart, stay as they were in pretraining.
`init_from` takes softmax checkpoints too: LUCID adds no parameter.

It is set for 4 devices, with one row on each. On one, cut a step into parts; on more, share
rows among devices:

    1 device: --config.accumulation=4
    8 devices: --config.mesh.context=2
    16 devices: --config.mesh.context=4

On a GPU of 80 GB also add `--config.model.remat=attention`: 8,000 tokens a second on one H200.

What fits a TPU slice is named after the colon: `lucid_1b_128k.py:v5p-2x2x4`, `:v6e-4x4`,
`:v5e-8x8`.
"""

from configs.common import at_size, base

SLICES: dict[str, dict] = {
    "v5p-2x2x4": {"fsdp": 4, "context": 4, "remat": "dots"},
    "v6e-4x4": {"fsdp": 4, "context": 4},
    "v5e-8x8": {"fsdp": 4, "context": 16},
}


def get_config(size: str = "full"):
    config = base()
    config.steps = 500
    config.batch_size = 4
    config.eval_every = 100
    config.eval_batches = 20
    config.model.update(rope_scaling="ntk", rope_factor=64.0)
    config.data.sequence_length = 131072
    config.optim.learning_rate = 5e-5
    config.checkpoint.update(every=100, init_from="runs/lucid_1b")
    return at_size(config, size, SLICES)
