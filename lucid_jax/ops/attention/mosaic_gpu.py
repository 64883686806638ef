"""The Mosaic GPU kernels of softmax attention: what they take, and where they are the fastest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lucid_jax.ops.attention import triton
from lucid_jax.ops.blocks import pad_axis
from lucid_jax.ops.by_batch import by_batch
from lucid_jax.ops.numerics import round_up
from lucid_jax.ops.precondition import mosaic_gpu as solve_kernels
from lucid_jax.ops.remat import save_for_backward

# By the largest head width the shortest sequences, and the fewest queries of all heads.
_LONG = {64: 2**16, 128: 2**13}
_MANY_QUERIES = 2**19


def unsupported(q: jax.Array, precision: jax.lax.Precision | None) -> str | None:
    """Says why the kernels cannot take queries like `q`, or returns None when they can."""
    if precision is not None:
        return "it multiplies 16 bits; got precision='highest'"
    # The kernels of the solve have the same limits.
    return solve_kernels.unsupported(q)


def is_fastest(q: jax.Array) -> bool:
    """Returns whether the kernels are faster than those of Triton (experiments/mosaic_gpu)."""
    b, s, heads, d = q.shape
    # Short sequences have more tiles to mask, and few queries leave most of the GPU without work.
    least = next((long for width, long in _LONG.items() if d <= width), None)
    return least is not None and s >= least and b * s * heads >= _MANY_QUERIES


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """Computes `softmax(scale·q kᵀ + causal) v`; shapes as in the public op."""
    del precision  # `unsupported` refuses calls that have one.
    return _attention(scale, q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q, k, v, segment_ids):
    return _attention_fwd(scale, q, k, v, segment_ids)[0]


def _attention_fwd(scale, q, k, v, segment_ids):
    results = by_batch(functools.partial(_forward, scale))(q, k, v, segment_ids)
    o, *norms = (save_for_backward(x) for x in results)
    return o, (q, k, v, segment_ids, o, *norms)


def _attention_bwd(scale, residuals, o_bar):
    o_bar = o_bar.astype(residuals[0].dtype)
    return *by_batch(functools.partial(_backward, scale))(*residuals, o_bar), None


_attention.defvjp(_attention_fwd, _attention_bwd)


# Kernels are imported in functions, because a jaxlib without GPUs need not have what they import.
def _forward(scale, q, k, v, segment_ids):
    from pallas_kernels.mosaic_gpu.attention import attend

    _, s, _, d = q.shape
    limits = _find_limits(segment_ids)
    options = {"scale": scale, "interpret": solve_kernels.INTERPRET}
    o, *norms = attend(*(_pad(x) for x in (q, k, v)), *limits, **options)
    return o[:, :s, :, :d], *norms


def _backward(scale, q, k, v, segment_ids, o, largest, inverse, o_bar):
    from pallas_kernels.mosaic_gpu.attention_gradient import (
        key_value_gradient,
        query_gradient,
        row_factors,
    )

    (_, s, _, d), length = q.shape, largest.shape[2]
    arrays = [_pad(x) for x in (q, k, v, o_bar)]
    o, o_bar = (pad_axis(x, 1, length) for x in (o, o_bar))
    factors = row_factors(o, o_bar, largest, inverse, scale)
    options = {"scale": scale, "interpret": solve_kernels.INTERPRET}
    q_bar = query_gradient(*arrays, factors, *_find_limits(segment_ids), **options)
    limits = _find_limits(segment_ids, reverse=True)
    found = q_bar, *key_value_gradient(*arrays, factors, *limits, **options)
    return tuple(x[:, :s, :, :d] for x in found)


def _pad(x):
    from pallas_kernels.mosaic_gpu.tile import ROWS, width

    return pad_axis(pad_axis(x, 1, round_up(x.shape[1], ROWS)), 3, width(x.shape[3]))


def _find_limits(segment_ids, *, reverse=False):
    from pallas_kernels.mosaic_gpu.tile import ROWS

    ids, visible = triton.find_visible(segment_ids, ROWS, reverse=reverse)
    return ids, None if visible is None else jnp.stack(visible, 2)
