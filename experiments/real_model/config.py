"""SmolLM2-135M goes on training at 16,384 tokens: with softmax, with LUCID, or with both by turns.

    python run.py --config=experiments/real_model/config.py:softmax --workdir=runs/stage/softmax
    python run.py --config=experiments/real_model/config.py:lucid --workdir=runs/stage/lucid
    python run.py --config=experiments/real_model/config.py:half --workdir=runs/stage/half

500 steps of 16 sequences, 131 million tokens, from the weights of `runs/smollm2`, on the text and
the retrieval samples of `runs/long_text` (README.md says how both are made). The same seed gives
every variant the same data in the same order. `:lucid-smoke` is two short steps of the same model,
minutes on a CPU. The learning rate is to be chosen for each variant: `sweep.py`.
"""

from configs.common import base
from lucid_jax.config import ConfigError

VARIANTS = {"softmax": "softmax", "lucid": "lucid", "half": "softmax,lucid"}
# The model's own length and base of RoPE. The base grows with the length, as in the paper.
_LENGTH, _ROPE_BASE = 8192, 100_000.0


def get_config(argument: str = "lucid"):
    """Returns the stage of a variant, or two steps of it for `VARIANT-smoke`."""
    variant, dash, size = argument.partition("-")
    if variant not in VARIANTS or (dash and size != "smoke"):
        known = ", ".join(VARIANTS)
        raise ConfigError(f"after the colon must be {known}, or one and -smoke; got {argument!r}")
    config = base()
    config.model.update(
        vocab_size=49152, num_layers=30, embed_dim=576, mlp_dim=1536, num_heads=9, num_kv_heads=3,
        head_dim=64, tie_embeddings=True, attention=VARIANTS[variant],
    )  # fmt: skip
    length = 16_384
    config.data.update(
        train="arrayrecord:runs/long_text/train-tokens@0.7,"
        "arrayrecord:runs/long_text/retrieval-tokens@0.3",
        eval="arrayrecord:runs/long_text/heldout-tokens",
        tokenizer="runs/smollm2/tokenizer.json",
        sequence_length=length,
    )
    config.model.rope_base = _ROPE_BASE * length / _LENGTH
    config.checkpoint.update(every=250, keep_last=1, keep_best=0, init_from="runs/smollm2")
    config.optim.learning_rate = 3e-4
    config.update(steps=500, batch_size=16, eval_every=250, eval_batches=20)
    if size == "smoke":
        config.update(steps=2, batch_size=2, log_every=1, eval_every=2, eval_batches=1)
        config.checkpoint.every = 2
        config.data.sequence_length = 256
    return config
