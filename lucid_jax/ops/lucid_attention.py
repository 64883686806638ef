"""`lucid_attention`: softmax attention over preconditioned values."""

from __future__ import annotations

import jax

from lucid_jax.ops.attention import softmax_attention
from lucid_jax.ops.precondition import precondition
from lucid_jax.ops.precondition.diagnostics import Diagnostics, Sample, Tokens, diagnose
from lucid_jax.ops.transitions import Transitions


def lucid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    beta: jax.Array | None = None,
    transitions: Transitions | None = None,
    implementation: str | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Computes causal LUCID attention, `softmax(q kᵀ/√D) A⁻¹ v` (arXiv 2602.10410).

    The softmax reads the keys themselves, `A` the normalised ones; see `precondition`
    for `A`, its bound and its numerics. It adds no parameter to softmax attention.

    Args:
      q: Queries `[B,S,H,D]`, float16, bfloat16, float32 or float64, after RoPE.
      k: Keys `[B,S,K,D]` of the same dtype; K divides H.
      v: Values `[B,S,K,D]` of the same dtype and width. (Narrower ones can be padded with zeros.)
      segment_ids: Integers `[B,S]`, told apart by their low 32 bits; tokens see only tokens of the
        same id. None is one segment.
      beta: β in [0, 1] `[B,S,K]`, of any float dtype, as in `precondition`; None is 1.
      transitions: Those of PaTH attention, for queries and keys without RoPE: LUCID-PaTH, with
        both the softmax and `A` of products through transitions. By `"triton"`, `"xla"` or
        `"reference"`, which then run both.
      implementation: None picks the best backend for the device, for the solve and for the
        softmax; `"xla"` and `"reference"` run both; without transitions `"triton"`,
        `"mosaic_gpu"` and `"mosaic_tpu"` run the solve in their kernels, or raise, and leave the
        softmax to the best backend.
      precision: None or `"highest"`, as in `precondition`.

    Returns:
      `o [B,S,H,D]`, dtype of `q`.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: shapes that do not match, or an unknown implementation or precision.
    """
    return _attend(q, k, v, segment_ids, beta, transitions, implementation, precision)[0]


def measured_lucid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sample: Sample,
    segment_ids: jax.Array | None = None,
    beta: jax.Array | None = None,
    transitions: Transitions | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Diagnostics]:
    """Computes `lucid_attention`, and diagnostics of the layer without another solve.

    With transitions these have no `off_diagonal`.
    """
    o, y = _attend(q, k, v, segment_ids, beta, transitions, implementation, None)
    tokens = Tokens.at(k, sample.segment_ids)
    # With transitions the rows of `A` are no products of a few keys.
    rows = Tokens.at(k, sample.segment_ids, sample.rows) if transitions is None else None
    return o, diagnose(rows, tokens, v, y)


def _attend(
    q, k, v, segment_ids, beta, transitions, implementation, precision
) -> tuple[jax.Array, jax.Array]:
    """Returns `o` and `y`."""
    options = {"segment_ids": segment_ids, "transitions": transitions, "precision": precision}
    y = precondition(k, v, beta=beta, implementation=implementation, **options)
    if transitions is None:
        implementation = softmax_implementation(implementation)
    return softmax_attention(q, k, y, implementation=implementation, **options), y


def softmax_implementation(implementation: str | None) -> str | None:
    """Returns the `implementation` of the softmax within LUCID attention."""
    return None if implementation in ("triton", "mosaic_gpu", "mosaic_tpu") else implementation
