"""Fine-tunes `lucid_1b` to 32768 tokens.

    python run.py --config=configs/lucid_1b_32k.py --workdir=runs/lucid_1b_32k \\
        --config.checkpoint.init_from=runs/lucid_1b \\
        --config.data.train='/data/long/*.array_record' --config.data.eval=... \\
        --config.data.tokenizer=/data/llama.model

500 steps of 16 sequences, as in the paper (`configs/paper/long_32k.py`), at 5e-5. The paper sets
the RoPE base to 64,000 at every length. Here it grows with the length (the "ntk" rule, 175,000 at
this one), so that the slowest rotation turns no further than in pretraining.
`init_from` takes softmax checkpoints too, because LUCID adds no parameter.

The file is set for 16 devices, each with one sequence. With fewer, split a step into
micro-batches; with more, share the heads among devices:

    8 devices: --config.accumulation=2
    32 devices: --config.mesh.tensor=2
    64 devices: --config.mesh.tensor=4
"""

from configs.common import at_size, base


def get_config(size: str = "full"):
    config = base()
    config.steps = 500
    config.batch_size = 16
    config.eval_every = 100
    config.eval_batches = 20
    config.model.update(rope_scaling="ntk", rope_factor=16.0)
    config.data.sequence_length = 32768
    config.optim.learning_rate = 5e-5
    config.checkpoint.update(every=100, init_from="runs/lucid_1b")
    return at_size(config, size)
