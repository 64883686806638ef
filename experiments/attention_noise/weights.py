"""Attention weights of a trained model that is asked for a needle.

M  questions    T  length    H  query heads    K  key/value heads    L  layers
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.activations import Trained, activations
from experiments.retrieval.task import Retrieval
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.ops.precondition.gram import Keys, gram_tile, normalize_keys

_HIGHEST = jax.lax.Precision.HIGHEST


class Questions(NamedTuple):
    """The questions of one sequence."""

    tokens: np.ndarray  # int32 `[T]`.
    asked: np.ndarray  # Position of the token before each answer, int `[M]`.
    value: np.ndarray  # Position where the answer's value first stands, int `[M]`.
    answer: np.ndarray  # The answers, int `[M]`.


def questions(task: Retrieval, text: np.ndarray, answers: np.ndarray) -> Questions:
    """Finds where the key and the answer of each question stood before.

    The text and the answers `[T+1]` are a sequence as the task draws it.
    """
    ends = np.flatnonzero(answers)
    pair = task.digits + 1
    before = text[: task.length + 1 - task.asked_tokens]
    windows = np.lib.stride_tricks.sliding_window_view(before, pair)
    found = [np.flatnonzero((windows == text[end + 1 - pair : end + 1]).all(1))[0] for end in ends]
    value = np.array(found) + pair - 1
    return Questions(text[:-1].astype(np.int32), ends - 1, value, text[ends])


class Weights(NamedTuple):
    """The weights of every question, `[L,H,M,T]` each."""

    softmax: jax.Array  # Attention probabilities.
    # What multiplies the values: `softmax · A⁻¹` in a LUCID layer, which may be negative, and the
    # probabilities again in a softmax layer.
    effective: jax.Array


def weights(model: Trained, questions: Questions) -> Weights:
    """Returns the weights of every layer and head at the questions; dense in T."""
    config = model.config.model
    found = activations(model.model, model.params, jnp.asarray(questions.tokens)[None])
    layers = []
    for kind, *qkv in zip(config.layer_kinds, *(x[:, 0] for x in found)):
        temperature = config.temperature if kind == "softmax" else 1.0
        p = _probabilities(qkv[0], qkv[1], jnp.asarray(questions.asked), temperature)
        layers.append((p, _through_inverse(qkv[1], p) if kind == "lucid" else p))
    return Weights(*(jnp.stack(x) for x in zip(*layers)))


@jax.jit
def _probabilities(q: jax.Array, k: jax.Array, asked: jax.Array, temperature: float) -> jax.Array:
    """Returns `[H,M,T]` from `q [T,H,D]` and `k [T,K,D]`."""
    length, heads, d = q.shape
    k = jnp.repeat(k, heads // k.shape[1], axis=1)
    logits = jnp.einsum("mhd,thd->hmt", q[asked], k, precision=_HIGHEST)
    logits = logits / (temperature * math.sqrt(d))
    return jax.nn.softmax(jnp.where(jnp.arange(length) <= asked[:, None], logits, -jnp.inf), -1)


@jax.jit
def _through_inverse(k: jax.Array, p: jax.Array) -> jax.Array:
    """Returns `p A⁻¹`, `[H,M,T]`, from keys `[T,K,D]`."""
    length, kv_heads, _ = k.shape
    keys = Keys(normalize_keys(k).swapaxes(0, 1)[None], None)
    a = jnp.tril(gram_tile(keys, keys, _HIGHEST)[0], -1)
    grouped = p.reshape(kv_heads, -1, length)
    solved = jax.lax.linalg.triangular_solve(
        a, grouped, left_side=False, lower=True, unit_diagonal=True
    )
    return solved.reshape(p.shape)


def describe(questions: Questions, found: Weights, width: int) -> dict[str, np.ndarray]:
    """Returns numbers of every layer and head, `[L,H]`, about needles of `width` tokens."""
    p, w = (np.asarray(x, np.float64) for x in found)
    question = np.arange(len(questions.value))
    at = question, questions.value
    sizes = np.abs(w)
    size = sizes.sum(-1)
    others = sizes.copy()
    others[:, :, question, questions.asked] = 0
    by_question = {
        # Probabilities of the needle's value, of its key and value, and of the token that asks.
        "value": p[:, :, *at],
        "needle": sum(p[:, :, question, questions.value - i] for i in range(width)),
        "own": p[:, :, question, questions.asked],
        "entropy": -(p * np.log(np.where(p > 0, p, 1))).sum(-1),
        # The value's effective weight, and its size as a share of the sizes of all.
        "effective_value": w[:, :, *at],
        "effective_share": sizes[:, :, *at] / size,
        # Whether no other token, except the one that asks, has a larger one.
        "largest": others.argmax(-1) == questions.value,
        # The sum of the sizes, 1 without `A`, and the share of them that is below zero.
        "effective_size": size,
        "negative": -np.minimum(w, 0).sum(-1) / size,
    }
    return {name: x.mean(-1) for name, x in by_question.items()}


@functools.partial(jax.jit, static_argnums=0)
def accuracy(model: LanguageModel, params, questions: Questions) -> jax.Array:
    """Returns the share of the questions that the model answers."""
    transformer = model.merge(params)
    tokens = jnp.asarray(questions.tokens)[None]
    x, _ = transformer(tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], None)
    found = jnp.argmax(x[0, questions.asked].astype(jnp.float32) @ transformer.head, -1)
    return jnp.mean(found == questions.answer)
