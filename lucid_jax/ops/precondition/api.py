"""`precondition`: checks, and the choice of a backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops import check
from lucid_jax.ops.precondition import mosaic_tpu as pallas_mosaic_tpu
from lucid_jax.ops.precondition import reference, xla
from lucid_jax.ops.precondition import triton as pallas_triton
from lucid_jax.ops.precondition.gram import accumulator_dtype
from lucid_jax.ops.precondition.prefix import Prefix

_BACKENDS = {
    "reference": reference.precondition,
    "xla": xla.precondition,
    "triton": pallas_triton.precondition,
    "mosaic_tpu": pallas_mosaic_tpu.precondition,
}


def precondition(
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    prefix: Prefix | None = None,
    implementation: str | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Preconditioned values `y`: the solution of `A y = v` (arXiv 2602.10410).

    `A` is lower triangular with unit diagonal, one for each batch row and head:
    `A_ij = exp(k̂_i·k̂_j/√D − √D)` for `j < i` in the same segment, where
    `k̂ = k·√D/‖k‖₂` (a zero key stays zero). For any keys `‖A⁻¹‖₂ ≤ 2`, hence
    `‖y‖ ≤ 2‖v‖`. Differentiable in `k`, `v` and the prefix; jit-able and vmappable.

    Args:
      k: Keys `[B,S,K,D]`, float16, bfloat16, float32 or float64, after RoPE. Any S ≥ 1.
      v: Values `[B,S,K,D]` of the same dtype.
      segment_ids: int32 `[B,S]`; rows see only rows of the same id. None is one segment.
      prefix: Rows already solved, which come before: the result is then
        `A_cc⁻¹ (v − A_cp y_p)`, the last S rows of the whole sequence's.
      implementation: None picks the best for the device; `"triton"` (kernels for GPUs),
        `"mosaic_tpu"` (kernels for TPUs), `"xla"` (blockwise, memory linear in S) and
        `"reference"` (dense) run that or raise.
      precision: None multiplies operands of the inputs' dtype and accumulates in
        float32, float32 operands as `jax.default_matmul_precision` says (the
        kernels never round them); `"highest"` is float32 throughout. Normalisation,
        exponents and the inverses of diagonal blocks are float32 in any case (float64
        for float64 inputs).

    Returns:
      `y [B,S,K,D]`, dtype of `v`.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: shapes that do not match, an unknown precision, or an implementation
        that is unknown or cannot run the call.
    """
    b, s, heads, d = check.shape("k", k, "BSKD")
    check.float_dtype("k", k)
    check.same("v", v, "BSKD", (b, s, heads, d), k.dtype)
    if segment_ids is not None:
        check.same("segment_ids", segment_ids, "BS", (b, s), jnp.int32)
    if prefix is not None:
        _, p, _, _ = check.shape("prefix.k", prefix.k, "BPKD")
        check.same("prefix.k", prefix.k, "BPKD", (b, p, heads, d), k.dtype)
        check.same("prefix.y", prefix.y, "BPKD", (b, p, heads, d), v.dtype)
        if (prefix.segment_ids is None) != (segment_ids is None):
            raise ValueError("segment_ids and prefix.segment_ids must be given together")
        if prefix.segment_ids is not None:
            check.same("prefix.segment_ids", prefix.segment_ids, "BP", (b, p), jnp.int32)
        if prefix.length is not None:
            check.same("prefix.length", prefix.length, "B", (b,), jnp.int32)
    full = check.precision(precision)
    reasons = {
        "triton": pallas_triton.unsupported(k),
        "mosaic_tpu": pallas_mosaic_tpu.unsupported(k),
    }
    backend = check.backend(implementation, _BACKENDS, reasons)
    dtype = v.dtype
    if full is not None:
        # Full precision means full operands too, not only full products.
        k, v = (x.astype(accumulator_dtype(dtype)) for x in (k, v))
    if prefix is not None:
        prefix = prefix.valid(k.dtype)
    return backend(k, v, segment_ids, prefix, full).astype(dtype)
