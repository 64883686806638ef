"""Checks converted weights beside transformers, and with LUCID before any training.

  python -m experiments.real_model.check --model=runs/smollm2 --huggingface=runs/smollm2-hf \\
      --text=2.Process.rst

Compares ids and float32 logits of the first tokens of a text with those of transformers on the
directory, and gives the loss of the same weights with other attention. Writes check.json.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measuring, reporting
from experiments.activations import Trained, build_model
from lucid_jax.config import ConfigError
from lucid_jax.data import load_tokenizer

_ROPE_BASES = (100_000.0, 200_000.0)
VARIANTS = (
    ("softmax", _ROPE_BASES),
    ("softmax,lucid", _ROPE_BASES[1:]),
    ("lucid", _ROPE_BASES[1:]),
)


def logits(trained: Trained, tokens: np.ndarray) -> jax.Array:
    """Returns the logits `[S,V]` of one document `[S]`, in float32."""

    @jax.jit
    def run(params, tokens):
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        model = trained.model.merge(params)
        return model(tokens, positions, None)[0] @ model.head

    return run(trained.params, tokens[None])[0]


def loss(logits: jax.Array, tokens: np.ndarray) -> float:
    """Returns the mean loss in nats of all tokens but the first."""
    likely = jax.nn.log_softmax(logits[:-1])
    return -float(jnp.take_along_axis(likely, tokens[1:, None], 1).mean())


def with_attention(trained: Trained, attention: str, rope_base: float) -> Trained:
    """Returns the same weights in a model of another attention and base of RoPE."""
    model = dataclasses.replace(trained.config.model, attention=attention, rope_base=rope_base)
    config = dataclasses.replace(trained.config, model=model)
    return Trained(config, build_model(config), trained.params)


def beside_transformers(directory: str, text: str, tokens: np.ndarray, ours: jax.Array) -> dict:
    """Compares ids and logits with those of transformers on a directory."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"--huggingface needs torch and transformers: {error}") from error
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([tokens.tolist()])).logits[0].numpy()
    difference = np.abs(np.asarray(ours) - theirs)
    return {
        "equal_ids": tokenizer(text)["input_ids"][: len(tokens)] == tokens.tolist(),
        "largest_logit": float(np.abs(theirs).max()),
        "largest_difference": float(difference.max()),
        "rms_difference": float(np.sqrt((difference**2).mean())),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints and writes the checks."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--model", required=True, help="work directory of the converted weights")
    parser.add_argument("--huggingface", help="directory that they came from")
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048, help="how many of the text")
    parser.add_argument("--short", type=int, default=512, help="how many for other attention")
    flags = parser.parse_args(argv)
    try:
        _run(flags)
    except ConfigError as error:
        parser.error(str(error))


def _run(flags: argparse.Namespace) -> None:
    trained = Trained.load(flags.model)
    text = flags.text.read_text(encoding="utf-8")
    tokens = load_tokenizer(f"{flags.model}/tokenizer.json").encode(text)[: flags.tokens]
    ours = logits(trained, tokens)
    found: dict[str, Any] = {"tokens": len(tokens), "loss": loss(ours, tokens)}
    if flags.huggingface:
        found |= beside_transformers(flags.huggingface, text, tokens, ours)
    short, records = tokens[: flags.short], []
    for attention, bases in VARIANTS:
        for base in bases:
            value = loss(logits(with_attention(trained, attention, base), short), short)
            records.append({"attention": attention, "rope_base": base, "loss": value})
    print(reporting.markdown(("check", "found"), reporting.rounded(found).items()))
    rows = [(x["attention"], f"{x['rope_base']:,.0f}", f"{x['loss']:.2f}") for x in records]
    print(reporting.markdown(("layers", "RoPE base", f"loss, {len(short)} tokens"), rows))
    others = ("torch", "transformers") if flags.huggingface else ()
    provenance = measuring.provenance(flags, ("flax", *others))
    reporting.write_json(flags.out / "check.json", **provenance, weights=found, records=records)


if __name__ == "__main__":
    main()
