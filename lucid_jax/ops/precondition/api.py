"""`precondition`: argument checks, the choice of a backend, the prefix, and the gradient."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax

from lucid_jax.ops import check
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.per_device import per_device
from lucid_jax.ops.precondition import reference
from lucid_jax.ops.precondition.backend import BACKENDS, Backend, unsupported
from lucid_jax.ops.precondition.isolated import isolated
from lucid_jax.ops.precondition.path import XlaPathBackend
from lucid_jax.ops.precondition.prefix import Prefix
from lucid_jax.ops.remat import save_for_backward
from lucid_jax.ops.transitions import Transitions, check_transitions, without_kernels


def precondition(
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    prefix: Prefix | None = None,
    transitions: Transitions | None = None,
    implementation: str | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Returns the preconditioned values `y`, the solution of `A y = v` (arXiv 2602.10410).

    `A` is lower triangular with unit diagonal, one for each sequence and KV head:
    `A_ij = exp(k̂_i·k̂_j/√D − √D)` for `j < i` in the same segment, where
    `k̂ = k·√D/‖k‖₂` (a zero key stays zero). For any keys `‖A⁻¹‖₂ ≤ 2`, hence
    `‖y‖ ≤ 2‖v‖`. Differentiable in `k`, `v`, the prefix and the transitions; jit-able and
    vmappable.

    A NaN or an infinity in a token of `k`, `v` or the transitions makes the results of that token
    and of later ones of its segment NaN, and no others; gradients likewise, in reverse. In the
    Triton kernels it can also reach the other tokens of its block of 64 or 128, and from them the
    later tokens of their segments.

    Args:
      k: Keys `[B,S,K,D]`, float16, bfloat16, float32 or float64, after RoPE. Any S ≥ 1.
      v: Values `[B,S,K,D]` of the same dtype and width. (Narrower ones can be padded with zeros.)
      segment_ids: Integers `[B,S]`, told apart by their low 32 bits; tokens see only tokens of the
        same id. None is one segment.
      prefix: Solved tokens that come before: the result is then
        `A_cc⁻¹ (v − A_cp y_p)`, the last S rows of the whole solution.
      transitions: Those of PaTH attention, for keys without RoPE: `k̂_i·k̂_j` becomes
        `k̂_iᵀ H_i ⋯ H_{j+1} k̂_j`, and the bound stays. Without a prefix, and by `"xla"` or
        `"reference"`; None picks `"xla"` on every device.
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
    b, s, heads, d = check.sequences("k", k, "BSKD")
    check.float_dtype("k", k)
    check.same("v", v, "BSKD", (b, s, heads, d), k.dtype)
    segment_ids = check.segments(segment_ids, k)
    if prefix is not None:
        if not isinstance(prefix, Prefix):
            raise TypeError(f"prefix must be a Prefix; got {type(prefix).__name__}")
        check.array("prefix.k", prefix.k)
        p = prefix.k.shape[1] if prefix.k.ndim == 4 else 0
        check.same("prefix.k", prefix.k, "BPKD", (b, p, heads, d), k.dtype)
        check.same("prefix.y", prefix.y, "BPKD", (b, p, heads, d), v.dtype)
        if (prefix.segment_ids is None) != (segment_ids is None):
            raise ValueError("segment_ids and prefix.segment_ids must be given together")
        ids, length = prefix.segment_ids, prefix.length
        if ids is not None:
            ids = check.integers("prefix.segment_ids", ids, "BP", (b, p))
        if length is not None:
            length = check.integers("prefix.length", length, "B", (b,))
        prefix = Prefix(prefix.k, prefix.y, ids, length) if p else None
    reasons = unsupported(k)
    if transitions is not None:
        check_transitions(transitions, k)
        if prefix is not None:
            raise ValueError("transitions must be given without a prefix; got both")
        reasons = without_kernels(reasons)
    full = check.precision(precision)
    backends = BACKENDS if transitions is None else {**BACKENDS, "xla": XlaPathBackend}
    backend = check.backend("solve", implementation, {"reference": None, **backends}, reasons)
    return _precondition(backend, full, k, v, segment_ids, prefix, transitions)


# Compiled once for a shape, also where it is called outside of `jax.jit`.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _precondition(
    backend: type[Backend] | None,
    precision: jax.lax.Precision | None,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    transitions: Transitions | None,
) -> jax.Array:
    def solve(k, v, segment_ids, prefix, transitions):
        dtype = v.dtype
        if precision is not None:
            # Full precision means full operands too, not only full products.
            k, v, transitions = jax.tree.map(
                lambda x: x.astype(accumulator_dtype(dtype)), (k, v, transitions)
            )
        if prefix is not None:
            prefix = prefix.masked(k.dtype)
        if backend is None:
            run = reference.precondition
            return isolated(run, k, v, segment_ids, prefix, transitions).astype(dtype)
        run = functools.partial(precondition_with, backend.for_sequences(k, precision))
        # A packed prefix has no kernel that keeps its documents apart.
        if backend.isolated or (prefix is not None and segment_ids is not None):
            return isolated(run, k, v, segment_ids, prefix, transitions).astype(dtype)
        return run(k, v, segment_ids, prefix, transitions).astype(dtype)

    arguments = k, v, segment_ids, prefix, transitions
    prefix_axes = cast(Any, Prefix)("BPKD", "BPKD", "BP", "B")
    axes = "BSKD", "BSKD", "BS", prefix_axes, cast(Any, Transitions)("BSKD", "BSK")
    return per_device(solve, axes, "BSKD", *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def precondition_with(
    backend: Backend,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    transitions: Transitions | None = None,
) -> jax.Array:
    """`precondition` by a given backend, of checked arguments; the tuners' entry point."""
    return _precondition_fwd(backend, k, v, segment_ids, prefix, transitions)[0]


def _precondition_fwd(backend, k, v, segment_ids, prefix, transitions):
    if transitions is not None:
        y = save_for_backward(backend.forward(k, v, segment_ids, transitions))
        return y, (k, y, segment_ids, prefix, transitions)
    rhs = v
    if prefix is not None:
        rows = backend.keys(k, segment_ids)
        columns = backend.keys(prefix.k, prefix.segment_ids)
        update = backend.product(rows, columns, prefix.y)
        rhs = v.astype(update.dtype) - update[:, : v.shape[1]]
    y = save_for_backward(backend.forward(k, rhs, segment_ids))
    return y, (k, y, segment_ids, prefix, transitions)


def _precondition_bwd(backend, residuals, y_bar):
    k, y, segment_ids, prefix, transitions = residuals
    if transitions is not None:
        k_bar, v_bar, transitions_bar = backend.backward(k, y, segment_ids, y_bar, transitions)
        return k_bar, v_bar, None, None, transitions_bar
    # Contributions of a prefix are added before the gradient is rounded.
    dtype = k.dtype if prefix is None else accumulator_dtype(k.dtype)
    k_bar, v_bar = backend.backward(k, y, segment_ids, y_bar, dtype)
    if prefix is None:
        return k_bar, v_bar, None, None, None
    rows = backend.keys(k, segment_ids)
    columns = backend.keys(prefix.k, prefix.segment_ids)
    k_bar += backend.cross_gradient(k, rows, v_bar, columns, prefix.y)
    prefix_k_bar = backend.cross_gradient(prefix.k, columns, prefix.y, rows, v_bar)
    prefix_y_bar = -backend.product(columns, rows, v_bar)[:, : prefix.y.shape[1]]
    prefix_bar = Prefix(prefix_k_bar.astype(k.dtype), prefix_y_bar.astype(y.dtype))
    return k_bar.astype(k.dtype), v_bar, None, prefix_bar, None


precondition_with.defvjp(_precondition_fwd, _precondition_bwd)
