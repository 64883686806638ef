"""`precondition`: argument checks, the choice of a backend, the prefix, and the gradient."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from lucid_jax.ops import check
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.per_device import per_device
from lucid_jax.ops.precondition import beta as learnt_beta
from lucid_jax.ops.precondition import path, reference
from lucid_jax.ops.precondition.backend import BACKENDS, SequenceBackend, unsupported
from lucid_jax.ops.precondition.isolated import isolated
from lucid_jax.ops.precondition.prefix import Prefix
from lucid_jax.ops.remat import save_for_backward
from lucid_jax.ops.transitions import Transitions, check_transitions, for_transitions


def precondition(
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    prefix: Prefix | None = None,
    beta: jax.Array | None = None,
    transitions: Transitions | None = None,
    implementation: str | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Returns the preconditioned values `y`, the solution of `A y = v` (arXiv 2602.10410).

    `A` is lower triangular with unit diagonal, one for each sequence and KV head:
    `A_ij = exp(k̂_i·k̂_j/√D − √D)` for `j < i` in the same segment, where
    `k̂ = k·√D/‖k‖₂` (a zero key stays zero). For any keys `‖A⁻¹‖₂ ≤ 2`, hence
    `‖y‖ ≤ 2‖v‖`. Differentiable in `k`, `v`, `beta`, the prefix and the transitions; jit-able and
    vmappable.

    With `beta` (the paper's learnt β) it is the solution of `(diag(1/β) + stril(A)) y = v`, that is
    `y = (I + diag(β) stril(A))⁻¹ diag(β) v`. The bounds hold for β ≤ 1 too: the symmetric part of
    that matrix is at least `diag(1/β) − I/2`.

    A NaN or an infinity in a token of `k`, `v`, `beta` or the transitions makes the results of that
    token and of later ones of its segment NaN, and no others; gradients likewise, in reverse. In
    the kernels for GPUs it can also reach the other tokens of its block of 64 or 128, and from them
    the later tokens of their segments; where the ids of segments do not ascend, those of all.

    Args:
      k: Keys `[B,S,K,D]`, float16, bfloat16, float32 or float64, after RoPE. Any S ≥ 1.
      v: Values `[B,S,K,D]` of the same dtype and width. (Narrower ones can be padded with zeros.)
      segment_ids: Integers `[B,S]`, told apart by their low 32 bits; tokens see only tokens of the
        same id. None is one segment.
      prefix: Solved tokens that come before: the result is then
        `A_cc⁻¹ (v − A_cp y_p)`, the last S rows of the whole solution.
      beta: β in [0, 1] `[B,S,K]`, of any of these dtypes; None is 1. Its values are not checked.
        All backends but the reference raise it to at least 2⁻⁶⁰, so that its gradient is right at
        0 too: `y` of a token with β = 0 is then of the order of 10⁻¹⁸ instead of 0. With float16
        keys the solve computes in float32.
      transitions: Those of PaTH attention, for keys without RoPE: `k̂_i·k̂_j` becomes
        `k̂_iᵀ H_i ⋯ H_{j+1} k̂_j`, and the bound stays. Without `beta`, and by `"triton"` (without a
        prefix), `"xla"` or `"reference"`. A prefix brings its own.
      implementation: None picks the best for the device; `"triton"` (kernels for GPUs),
        `"mosaic_gpu"` (kernels for Hopper GPUs and 16 bits, without prefix and β), `"mosaic_tpu"`
        (kernels for TPUs), `"xla"` (blockwise, memory linear in S) and `"reference"` (dense) run
        that or raise.
      precision: None multiplies operands of the inputs' dtype and accumulates in float32, float32
        operands as `jax.default_matmul_precision` says (the kernels never round them). The kernels
        for GPUs solve bfloat16 sequences in scaled float16 (`pallas_kernels/triton/scaled.py`),
        which is more exact, but for `beta`, a prefix and the shards of a sequence; segments whose
        ids do not ascend then share a scale. `"highest"` is float32 throughout. Normalisation,
        exponents and the inverses of diagonal blocks are float32 in any case (float64 for float64
        inputs).

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
    check.beta(beta, "BSK", (b, s, heads))
    if prefix is not None:
        if not isinstance(prefix, Prefix):
            raise TypeError(f"prefix must be a Prefix; got {type(prefix).__name__}")
        check.array("prefix.k", prefix.k)
        p = prefix.k.shape[1] if prefix.k.ndim == 4 else 0
        check.same("prefix.k", prefix.k, "BPKD", (b, p, heads, d), k.dtype)
        check.same("prefix.y", prefix.y, "BPKD", (b, p, heads, d), v.dtype)
        for name, own in (("segment_ids", segment_ids), ("transitions", transitions)):
            if (getattr(prefix, name) is None) != (own is None):
                raise ValueError(f"{name} and prefix.{name} must be given together")
        ids, length = prefix.segment_ids, prefix.length
        if ids is not None:
            ids = check.integers("prefix.segment_ids", ids, "BP", (b, p))
        if length is not None:
            length = check.integers("prefix.length", length, "B", (b,))
        if prefix.transitions is not None:
            check_transitions(prefix.transitions, prefix.k, "BPKD", "prefix.transitions")
        prefix = dataclasses.replace(prefix, segment_ids=ids, length=length) if p else None
    full = check.precision(precision)
    plain = prefix is None and beta is None and full is None
    reasons = unsupported(k, plain=plain)
    if transitions is not None:
        check_transitions(transitions, k)
        if beta is not None:
            raise ValueError("transitions must be given without beta; got both")
        reasons = for_transitions(reasons)
        if prefix is not None and not reasons["triton"]:
            reasons["triton"] = "it takes no transitions with a prefix"
    backend = check.backend("solve", implementation, {"reference": None, **BACKENDS}, reasons)
    return _precondition(backend, full, k, v, segment_ids, prefix, beta, transitions)


# Compiled once for a shape, also where it is called outside of `jax.jit`.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _precondition(
    backend: type[SequenceBackend] | None,
    precision: jax.lax.Precision | None,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    beta: jax.Array | None,
    transitions: Transitions | None,
) -> jax.Array:
    def solve(k, v, segment_ids, prefix, beta, transitions):
        dtype = v.dtype
        if beta is not None:
            beta = beta.astype(accumulator_dtype(dtype))
        # Full precision means full operands too, not only full products.
        if precision is not None or (beta is not None and dtype == jnp.float16):
            k, v, transitions = jax.tree.map(
                lambda x: x.astype(accumulator_dtype(dtype)), (k, v, transitions)
            )
        if prefix is not None:
            prefix = prefix.masked(k.dtype)
        solved = 0
        if prefix is not None and transitions is not None:
            # What lies between two tokens of a segment is found by sorting them all by segment.
            solved = prefix.k.shape[1]
            k, v, segment_ids, transitions = prefix.join(k, v, segment_ids, transitions)
            prefix = None

        def run(k, v, segment_ids, prefix, beta, transitions):
            if backend is None:
                return reference.precondition(solved, k, v, segment_ids, prefix, beta, transitions)
            if transitions is not None:
                kernels = backend is not BACKENDS["xla"]
                return path.precondition(kernels, precision, solved, k, v, segment_ids, transitions)
            own = backend.for_sequences(k, precision)
            return precondition_with(own, k, v, segment_ids, prefix, beta)

        # A packed prefix has no kernel that keeps its documents apart.
        packed_prefix = prefix is not None and segment_ids is not None
        if backend is None or backend.isolated or transitions is not None or packed_prefix:
            run = functools.partial(isolated, run)
        return run(k, v, segment_ids, prefix, beta, transitions)[:, solved:].astype(dtype)

    arguments = k, v, segment_ids, prefix, beta, transitions
    of_tokens = cast(Any, Transitions)
    prefix_axes = cast(Any, Prefix)("BPKD", "BPKD", "BP", "B", of_tokens("BPKD", "BPK"))
    axes = "BSKD", "BSKD", "BS", prefix_axes, "BSK", of_tokens("BSKD", "BSK")
    return per_device(solve, axes, "BSKD", *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def precondition_with(
    backend: SequenceBackend,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix: Prefix | None,
    beta: jax.Array | None = None,
) -> jax.Array:
    """`precondition` by a given backend, of checked arguments; the tuners' entry point.

    `beta` is in the accumulator dtype.
    """
    return _precondition_fwd(backend, k, v, segment_ids, prefix, beta)[0]


def _precondition_fwd(backend, k, v, segment_ids, prefix, beta):
    beta, rhs = learnt_beta.at_least(beta), v
    if prefix is not None:
        rows = backend.keys(k, segment_ids)
        columns = backend.keys(prefix.k, prefix.segment_ids)
        update = backend.product(rows, columns, prefix.y)
        rhs = v.astype(update.dtype) - update[:, : v.shape[1]]
    y, residual = jax.tree.map(save_for_backward, backend.forward(k, rhs, segment_ids, beta))
    return y, (k, y, residual, segment_ids, prefix, beta)


def _precondition_bwd(backend, residuals, y_bar):
    k, y, residual, segment_ids, prefix, beta = residuals
    # Contributions of a prefix are added before the gradient is rounded.
    dtype = k.dtype if prefix is None else accumulator_dtype(k.dtype)
    k_bar, v_bar = backend.backward(k, y, residual, segment_ids, y_bar, dtype, beta)
    beta_bar = None if beta is None else learnt_beta.gradient(beta, y, v_bar)
    if prefix is None:
        return k_bar, v_bar, None, None, beta_bar
    rows = backend.keys(k, segment_ids)
    columns = backend.keys(prefix.k, prefix.segment_ids)
    k_bar += backend.cross_gradient(k, rows, v_bar, columns, prefix.y)
    prefix_k_bar = backend.cross_gradient(prefix.k, columns, prefix.y, rows, v_bar)
    prefix_y_bar = -backend.product(columns, rows, v_bar)[:, : prefix.y.shape[1]]
    prefix_bar = Prefix(prefix_k_bar.astype(k.dtype), prefix_y_bar.astype(y.dtype))
    return k_bar.astype(k.dtype), v_bar, None, prefix_bar, beta_bar


precondition_with.defvjp(_precondition_fwd, _precondition_bwd)
