"""The Mosaic GPU kernel of softmax attention; the Triton kernels compute its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.attention import triton
from lucid_jax.ops.blocks import pad_axis
from lucid_jax.ops.by_batch import by_batch
from lucid_jax.ops.numerics import round_up
from lucid_jax.ops.precondition import mosaic_gpu as solve_kernels


def unsupported(q: jax.Array, precision: jax.lax.Precision | None) -> str | None:
    """Says why the kernel cannot take queries like `q`, or returns None when it can."""
    if precision is not None:
        return "it multiplies 16 bits; got precision='highest'"
    # The kernels of the solve have the same limits, and so have those of the gradient.
    return solve_kernels.unsupported(q) or triton.unsupported(q)


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
    return triton.attention_with(forward, scale, q, k, v, segment_ids)


def forward(scale, q, k, v, segment_ids):
    """Returns `o`, and the maxima and norms that its gradient needs, as `attend` does."""

    def run(q, k, v, segment_ids):
        # Imported here, because a jaxlib without GPUs need not have what the kernel imports.
        from pallas_kernels.mosaic_gpu.attention import attend
        from pallas_kernels.mosaic_gpu.tile import ROWS, width

        _, s, _, d = q.shape
        arrays = (pad_axis(pad_axis(x, 1, round_up(s, ROWS)), 3, width(d)) for x in (q, k, v))
        ids, visible = triton.find_visible(segment_ids, ROWS)
        limits = None if visible is None else jnp.stack(visible, 2)
        o, *norms = attend(*arrays, ids, limits, scale=scale, interpret=solve_kernels.INTERPRET)
        return o[:, :s, :, :d], *norms

    return by_batch(run)(q, k, v, segment_ids)
