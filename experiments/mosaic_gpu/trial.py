"""Softmax attention whose gradients too are Mosaic GPU kernels: keys of 16 bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.attention import mosaic_gpu, triton
from lucid_jax.ops.blocks import pad_axis
from lucid_jax.ops.precondition import mosaic_gpu as solve_kernels
from pallas_kernels.mosaic_gpu.attention_gradient import (
    key_value_gradient,
    query_gradient,
    row_factors,
)
from pallas_kernels.mosaic_gpu.tile import ROWS, width


@jax.custom_vjp
def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """`lucid_jax.softmax_attention` of `[B,S,H,D]` in float16 or bfloat16, D at most 128."""
    return _forward(q, k, v, segment_ids)[0]


def _forward(q, k, v, segment_ids):
    o, *norms = mosaic_gpu.forward(q.shape[-1] ** -0.5, q, k, v, segment_ids)
    return o, (q, k, v, segment_ids, o, *norms)


def _backward(residuals, o_bar):
    q, k, v, segment_ids, o, largest, inverse = residuals
    (_, s, _, d), length = q.shape, largest.shape[2]
    arrays = [pad_axis(pad_axis(x, 1, length), 3, width(d)) for x in (q, k, v, o_bar)]
    o, o_bar = (pad_axis(x, 1, length) for x in (o, o_bar))
    factors = row_factors(o, o_bar, largest, inverse, d**-0.5)

    def run(gradient, *, reverse):
        ids, visible = triton.find_visible(segment_ids, ROWS, reverse=reverse)
        limits = None if visible is None else jnp.stack(visible, 2)
        options = {"scale": d**-0.5, "interpret": solve_kernels.INTERPRET}
        return gradient(*arrays, factors, ids, limits, **options)

    found = run(query_gradient, reverse=False), *run(key_value_gradient, reverse=True)
    return *(x[:, :s, :, :d] for x in found), None


softmax_attention.defvjp(_forward, _backward)
