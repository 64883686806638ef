"""The share of a model's attention on the needle that a prompt of RULER asks for."""

from typing import NamedTuple

import numpy as np

from experiments.activations import Trained
from experiments.attention_noise.weights import Questions, weights
from lucid_jax.config import ConfigError
from lucid_jax.data import load_tokenizer
from lucid_jax.data.tokenizer import Tokenizer, encode_prompt
from lucid_jax.evaluate.request import SEED
from lucid_jax.evaluate.tasks import Sample, Task


class HitRates(NamedTuple):
    """The share of a head's weights on the needle's value, mean over prompts.

    `softmax` counts the probabilities, `effective` the sizes of what multiplies the values
    (`softmax · A⁻¹` in a LUCID layer). `best` is of the head where it is largest, `mean` of all.
    """

    best_softmax: float
    best_effective: float
    mean_softmax: float
    mean_effective: float


def hit_rates(model: Trained, task: Task, length: int, samples: int) -> HitRates:
    """Measures the last token of each prompt, which the answer follows.

    Raises:
      ConfigError: the model has layers without one softmax map a head.
    """
    if "differential" in model.config.model.layer_kinds:
        raise ConfigError("a head of a differential layer has no probabilities to count as hits")
    tokenizer = load_tokenizer(model.config.data.tokenizer)
    softmax, effective = 0.0, 0.0
    for index in range(samples):
        sample = task.sample(tokenizer, length, SEED, index)
        tokens, needle = _locate(tokenizer, sample)
        # All prompts have one shape; no token sees the padding.
        padded = np.pad(tokens, (0, length - len(tokens)))
        asked, value = np.array([len(tokens) - 1]), np.array([needle.start])
        found = weights(model, Questions(padded, asked, value, tokens[value]))
        p, w = (np.abs(np.asarray(x, np.float64)[:, :, 0]) for x in found)
        softmax += p[:, :, needle].sum(-1) / samples
        effective += w[:, :, needle].sum(-1) / w.sum(-1) / samples
    rates = np.stack([softmax, effective])
    return HitRates(*rates.max((1, 2)).tolist(), *rates.mean((1, 2)).tolist())


def _locate(tokenizer: Tokenizer, sample: Sample) -> tuple[np.ndarray, slice]:
    """Returns the tokens of a prompt, and those of its answer's first occurrence."""
    [answer] = sample.answers
    before, _, _ = sample.prompt.partition(answer)
    start, end = (len(encode_prompt(tokenizer, text)) for text in (before, before + answer))
    # A blank before the answer may be a token alone, or the beginning of the answer's first.
    blank = len(encode_prompt(tokenizer, before.rstrip()))
    tokens = np.array(encode_prompt(tokenizer, sample.prompt), np.int32)
    return tokens, slice(min(start, blank + 1), end)
