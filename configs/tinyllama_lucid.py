"""Fine-tunes TinyLlama, 1.1 billion parameters, with LUCID attention at 2048 tokens.

LUCID adds no parameter, so the run starts from weights trained with softmax attention. Put
the Hugging Face directory (config.json, safetensors, tokenizer) at, say, `tinyllama-hf/`:

    python -m lucid_jax.convert from-hf --input=tinyllama-hf --output=runs/tinyllama
    python run.py --config=configs/tinyllama_lucid.py --workdir=runs/tinyllama_lucid \\
        --config.data.train='/data/dolma/*.array_record' --config.data.eval=...
    python -m lucid_jax.convert to-hf --input=runs/tinyllama_lucid --output=tinyllama-lucid-hf

The last command writes a directory that transformers loads with `trust_remote_code=True`, with the
code of LUCID attention beside the weights. To compare the loss before and after on the same text:

    python run.py --config=runs/tinyllama/config.py --mode=eval --workdir=runs/tinyllama \\
        --config.data.eval=...
    python run.py --config=configs/tinyllama_lucid.py --mode=eval \\
        --workdir=runs/tinyllama_lucid --config.data.eval=...

1000 steps of 64 sequences at 5e-5, our choice. For another model, use the `config.py` that the
first command writes, with `--config.model.attention=lucid`.

The file is set for 8 devices, each with 8 sequences at a time. On fewer, add

    1 device: --config.accumulation=8
    2 devices: --config.accumulation=4
    4 devices: --config.accumulation=2
"""

from configs.common import at_size, base


def get_config(size: str = "full"):
    config = base()
    config.steps = 1000
    config.batch_size = 64
    config.eval_every = 250
    config.eval_batches = 20
    config.data.tokenizer = "runs/tinyllama/tokenizer.json"
    config.optim.learning_rate = 5e-5
    config.checkpoint.update(every=250, init_from="runs/tinyllama")
    return at_size(config, size)
