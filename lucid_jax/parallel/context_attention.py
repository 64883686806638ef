"""LUCID and softmax attention of sequences that are sharded over a mesh axis.

The functions here are called under `shard_map`, on the tokens of one device in the order of
`lucid_jax.parallel.stripes`: C devices, N stripes of C blocks of b tokens, S = N·C·b.

## By heads

Where C divides K, an all-to-all gives each device whole sequences of K/C KV heads, and
everything runs there as on one device, by the best library. PaTH's transitions need this.

## By stripes

Otherwise the keys are gathered, and the solve takes the stripes in order. At stripe t a device

1. brings its block up to date with stripe t − 1: b rows against C·b columns;
2. gathers the residuals of the right-hand sides of the stripe, `v − A y`;
3. meanwhile brings all its later rows up to date with stripe t − 1: nearly all the work,
   the same on every device, and independent of the gather;
4. solves the stripe of C·b rows. All devices do so at once, so that each has all of `y`, which
   the softmax needs, without another gather.

A compiler that can start a gather and go on runs step 3 between the start and the end of step 2;
the TPU compiler does so only with the flags that the README names.

In step 4 the devices repeat each other's work: C²b/S of their share of the solve, which is K/H of
the attention's. Sharing the B·K chains of blocks out among them would not shorten the step, since
chains run side by side anyway, but would put a second exchange on the critical path. A
left-looking solve, where a block takes in all its past at once, would give the kernels of a step
only b rows to work on (4 programs of a GPU for b = 256); this right-looking one gives them all
later rows.

On GPUs step 4 of one or two heads, in 16 bits, uses inverses of blocks of up to 2048 rows where
they are faster than the chain. Every device makes them of the keys of all tokens before the loop:
w·B·S·K·2048 bytes while a layer is solved, at most 2 GiB.

## Backward

The transposed solve is the same one from the last stripe to the first, on rows in reverse order,
because `A` is symmetric off its diagonal. The key gradient is parallel in the rows of a device,
against gathered keys, `y` and `v̄`, with nothing to reduce. The softmax of a device's queries
contributes to the gradients of all keys and values; these are summed and scattered in float32.

## Softmax

Splash attention and the blockwise XLA path attend with a subset of the queries as they are. The
GPU libraries take whole sequences only. Where C divides H and is a multiple of K they run **by
query heads**: an all-to-all gives each device whole sequences of H/C query heads, which read one
of the gathered KV heads; the gradients of that head are the device's share. The work is the same
on every device.

## What is sent

Results on one device, for B sequences and w bytes an element; segment ids, if any, add one
all-gather of 4·B·S bytes, and β one of 4·B·S·K bytes, or by heads an all-to-all each way, as
transitions have of w·B·(S/C)·K·(D + 1) bytes:

    LUCID     each way  all-gather      1   bad tokens    B·S·K
              forward   all-gather      1   K             w·B·S·K·D
                        all-gather      N   residuals     4·B·S·K·D in all
              backward  all-gather      N   residuals     4·B·S·K·D in all
                        reduce-scatter  2   K̄, Ȳ          2·4·B·(S/C)·K·D
    softmax   forward   all-gather      2   K, V          2·w·B·S·K·D
              backward  reduce-scatter  2   K̄, V̄          2·4·B·(S/C)·K·D
    by query heads, in addition
              each way  all-to-all      2   Q, O          w·B·(S/C)·2H·D
    by heads  each way  all-to-all      4   Q, K, V, O    w·B·(S/C)·(2H + 2K)·D
    telemetry forward   all-gather      1   segment ids   4·B·S, and sums of a few numbers

K and Y stay gathered between forward and backward, 2·w·B·S·K·D bytes (134 MB for 131072 tokens of
4 heads of 64), which saves two gathers. Rematerialisation that saves attention's results keeps
this Y of every layer, and sends K, Q and O again; "full" solves again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from lucid_jax.ops import check
from lucid_jax.ops.attention import softmax_attention as local_softmax_attention
from lucid_jax.ops.attention.api import SubsetBackend, logits_scale
from lucid_jax.ops.isolation import bad_tokens, clear, mark, spread
from lucid_jax.ops.lucid_attention import lucid_attention as local_lucid_attention
from lucid_jax.ops.lucid_attention import (
    measured_lucid_attention as local_measured_lucid_attention,
)
from lucid_jax.ops.lucid_attention import softmax_implementation
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.per_device import per_device
from lucid_jax.ops.precondition import beta as learnt_beta
from lucid_jax.ops.precondition import precondition as local_precondition
from lucid_jax.ops.precondition.backend import Backend, choose_stripe_backend
from lucid_jax.ops.precondition.diagnostics import Diagnostics, Sample, Tokens, diagnose
from lucid_jax.ops.query_positions import QueryPositions
from lucid_jax.ops.remat import save_for_backward
from lucid_jax.ops.transitions import Transitions, check_transitions
from lucid_jax.parallel.context_shard import ContextShard
from lucid_jax.parallel.context_softmax import choose_softmax
from lucid_jax.parallel.context_solve import GatheredKeys, solve, solve_gradients


def lucid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    segment_ids: jax.Array | None = None,
    beta: jax.Array | None = None,
    transitions: Transitions | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Computes `lucid_jax.lucid_attention` of sharded sequences; call it under `shard_map`.

    Args:
      q: Queries of this device `[B,S/C,H,D]`, in the order of `Stripes`.
      k: Keys `[B,S/C,K,D]` of the same dtype; K divides H.
      v: Values `[B,S/C,K,D]` of the same dtype.
      axis_name: The mesh axis, of C devices.
      stripe: b, tokens of a block; divides S/C.
      segment_ids: Integers `[B,S/C]`, or None.
      beta: β `[B,S/C,K]`, or None; with float16 keys only where C divides K.
      transitions: Those of this device's tokens, or None; only where C divides K.
      implementation: As in the op of one device; `"reference"` only where C divides K.

    Returns:
      `o [B,S/C,H,D]`, dtype of `q`.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: shapes that do not match, a stripe that does not divide the tokens, or an
        implementation that is unknown or cannot run the call.
    """
    shard, segment_ids = ContextShard.from_inputs(axis_name, stripe, q, k, v, segment_ids)
    check.beta(beta, "BSK", k.shape[:3])
    if _takes_heads(shard, k, transitions):
        op = functools.partial(local_lucid_attention, implementation=implementation)
        return _by_heads(shard, op, q, k, v, segment_ids, beta=beta, transitions=transitions)[0]
    backend, softmax = _lucid_backends(shard, implementation, q, k, segment_ids)
    return _by_stripes(shard, backend, softmax, q, k, v, segment_ids, beta=beta)[0]


def measured_lucid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    sample: Sample,
    segment_ids: jax.Array | None = None,
    beta: jax.Array | None = None,
    transitions: Transitions | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Diagnostics]:
    """Computes `lucid_attention`, and diagnostics of the layer without another solve.

    The diagnostics are those of this device's share of the heads or columns; the largest among
    the devices are those of the sequences.
    """
    shard, segment_ids = ContextShard.from_inputs(axis_name, stripe, q, k, v, segment_ids)
    check.beta(beta, "BSK", k.shape[:3])
    if _takes_heads(shard, k, transitions):
        op = functools.partial(local_measured_lucid_attention, implementation=implementation)
        o, diagnostics = _by_heads(
            shard, op, q, k, v, segment_ids, sample=sample, beta=beta, transitions=transitions
        )
    else:
        backends = _lucid_backends(shard, implementation, q, k, segment_ids)
        arrays = q, k, v, segment_ids
        o, diagnostics = _by_stripes(shard, *backends, *arrays, sample=sample, beta=beta)
    return o, jax.lax.stop_gradient(diagnostics)


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    segment_ids: jax.Array | None = None,
    transitions: Transitions | None = None,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """Computes `lucid_jax.softmax_attention` of sharded sequences, as in `lucid_attention`.

    `implementation` and `temperature` are those of the op of one device. Implementations other
    than None, `"splash"` and `"xla"` need whole sequences: C divides K, or divides H and is a
    multiple of K.
    """
    shard, segment_ids = ContextShard.from_inputs(axis_name, stripe, q, k, v, segment_ids)
    if _takes_heads(shard, k, transitions):
        op = functools.partial(
            local_softmax_attention, implementation=implementation, temperature=temperature
        )
        return _by_heads(shard, op, q, k, v, segment_ids, transitions=transitions)[0]
    softmax = _softmax(shard, implementation, temperature, q, k, segment_ids)
    return _by_stripes(shard, None, softmax, q, k, v, segment_ids)[0]


def precondition(
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    segment_ids: jax.Array | None = None,
    beta: jax.Array | None = None,
    transitions: Transitions | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Computes `lucid_jax.precondition` of sharded sequences, as in `lucid_attention`."""
    shard, segment_ids = ContextShard.from_inputs(axis_name, stripe, k, k, v, segment_ids)
    check.beta(beta, "BSK", k.shape[:3])
    if _takes_heads(shard, k, transitions):
        op = functools.partial(local_precondition, implementation=implementation)
        return _by_heads(shard, op, k, v, segment_ids, beta=beta, transitions=transitions)[0]
    backend = choose_stripe_backend(implementation, k, stripe)
    return _by_stripes(shard, backend, None, None, k, v, segment_ids, beta=beta)[0]


def _takes_heads(shard: ContextShard, k: jax.Array, transitions: Transitions | None) -> bool:
    """Returns whether an op runs by heads; raises if only that can take its transitions."""
    if transitions is not None:
        check_transitions(transitions, k)
        if not shard.divides_kv_heads(k):
            raise ValueError(
                "transitions need whole sequences: the number of devices must divide K;"
                f" got {shard.stripes.shards} devices, K={k.shape[2]}"
            )
    return shard.divides_kv_heads(k)


def _by_heads(
    shard: ContextShard,
    op: Callable[..., Any],
    *arrays: jax.Array | None,
    sample: Sample | None = None,
    beta: jax.Array | None = None,
    transitions: Transitions | None = None,
) -> tuple[jax.Array, Any]:
    """Runs an op of one device on whole sequences; the last array is the segment ids.

    Given a sample, the op takes it whole, and returns diagnostics beside its result.
    """
    rows, sampled_ids = sample or (None, None)

    def run(*arrays):
        *sequences, segment_ids, sampled_ids, beta, transitions = arrays
        heads = map(shard.to_heads, sequences)
        options = {"segment_ids": None if segment_ids is None else shard.gather(segment_ids)}
        if beta is not None:
            options["beta"] = shard.to_heads(beta[..., None])[..., 0]
        if transitions is not None:
            options["transitions"] = transitions.map(shard.to_heads)
        if rows is None:
            return shard.to_tokens(op(*heads, **options)), None
        o, diagnostics = op(*heads, sample=Sample(rows, shard.gather(sampled_ids)), **options)
        return shard.to_tokens(o), diagnostics

    of_tokens = cast(Any, Transitions)("BSHD", "BSH")
    axes = *("BSHD",) * (len(arrays) - 1), "BS", "BS", "BSH", of_tokens
    return per_device(run, axes, ("BSHD", "B"), *arrays, sampled_ids, beta, transitions)


def _by_stripes(
    shard,
    backend,
    softmax,
    q,
    k,
    v,
    segment_ids,
    sample: Sample | None = None,
    beta: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    rows, sampled_ids = sample or (None, None)
    if beta is not None:
        if k.dtype == jnp.float16:
            raise ValueError(
                "beta with float16 keys needs whole sequences: the number of devices must divide K;"
                f" got {shard.stripes.shards} devices, K={k.shape[2]}"
            )
        beta = beta.astype(accumulator_dtype(k.dtype))
    run = functools.partial(_attention, shard, backend, softmax, rows)
    axes = "BSHD", "BSKD", "BSKD", "BS", "BS", "BSK"
    return per_device(run, axes, ("BSHD", "B"), q, k, v, segment_ids, sampled_ids, beta)


class _Softmax(NamedTuple):
    """A backend of the softmax, and the factor of its logits."""

    backend: SubsetBackend
    scale: float


def _lucid_backends(shard, implementation, q, k, segment_ids) -> tuple[Backend, _Softmax]:
    backend = choose_stripe_backend(implementation, k, shard.stripes.width)
    implementation = softmax_implementation(implementation)
    return backend, _softmax(shard, implementation, 1.0, q, k, segment_ids)


def _softmax(shard, implementation, temperature, q, k, segment_ids) -> _Softmax:
    backend = choose_softmax(shard, implementation, q, k, segment_ids)
    return _Softmax(backend, logits_scale(temperature, q.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attention(
    shard: ContextShard,
    backend: Backend | None,
    softmax: _Softmax | None,
    sampled_rows: tuple[int, ...] | None,
    q: jax.Array | None,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sampled_ids: jax.Array | None,
    beta: jax.Array | None,
) -> tuple[jax.Array, Diagnostics | None]:
    """Computes the softmax over preconditioned values, by stripes, and diagnostics of a sample.

    Without a `backend` the values are not preconditioned; without `softmax` the preconditioned
    values of this device's tokens are the result, and `q` is None. `sampled_rows` and
    `sampled_ids` are those of `Sample`, or None.
    """
    arrays = q, k, v, segment_ids, sampled_ids, beta
    return _attention_fwd(shard, backend, softmax, sampled_rows, *arrays)[0]


def _attention_fwd(shard, backend, softmax, sampled_rows, q, k, v, segment_ids, sampled_ids, beta):
    # The softmax keeps what it needs itself.
    solved = None
    if backend is None:
        keys, y_all = GatheredKeys.gather(shard, k, segment_ids), shard.gather(v)
    else:
        bad = bad_tokens(k, v)
        if beta is not None:
            bad |= ~jnp.isfinite(beta)
            beta = learnt_beta.at_least(jnp.where(bad, 0, beta))
        keys = GatheredKeys.gather(shard, clear(k, bad), segment_ids, beta)
        reached = spread(shard.gather(bad), keys.segment_ids_all)
        y_all = save_for_backward(mark(solve(shard, backend, keys, clear(v, bad)), reached))
        solved = keys, y_all, reached
    if softmax is None:
        return (shard.own(y_all), None), (solved, None)
    diagnostics = None
    if sampled_rows is not None:
        rows = Tokens.at(keys.k_all, shard.gather(sampled_ids), sampled_rows)
        tokens = Tokens(k, sampled_ids, shard.positions())
        diagnostics = diagnose(rows, tokens, v, shard.own(y_all), shard.axis)
    at = QueryPositions(shard.positions(), segment_ids, keys.segment_ids_all)
    o, attended = softmax.backend.forward(softmax.scale, None, q, keys.k_all, y_all, at)
    return (o, diagnostics), (solved, attended)


def _attention_bwd(shard, backend, softmax, sampled_rows, residuals, cotangents):
    solved, attended = residuals
    o_bar, _ = cotangents
    q_bar, k_bar, v_bar, beta_bar = None, jnp.zeros((), o_bar.dtype), o_bar, None
    if softmax is not None:
        q_bar, *shares = softmax.backend.backward(softmax.scale, None, attended, o_bar)
        k_bar, v_bar = (shard.scatter(x.astype(accumulator_dtype(x.dtype))) for x in shares)
    if solved is not None:
        keys, y_all, reached = solved
        bad = shard.own(reached) | bad_tokens(v_bar)
        y_all = clear(y_all, reached)
        gradients = solve_gradients(shard, backend, keys, y_all, clear(v_bar, bad))
        reaching = shard.own(spread(shard.gather(bad), keys.segment_ids_all, reverse=True))
        if keys.beta_all is not None:
            beta = shard.own(keys.beta_all)
            beta_bar = learnt_beta.gradient(beta, shard.own(y_all), gradients[1])
            beta_bar = jnp.where(reaching, jnp.nan, beta_bar)
        solve_k_bar, v_bar = (mark(x, reaching) for x in gradients)
        k_bar = k_bar + solve_k_bar
    return q_bar, k_bar.astype(o_bar.dtype), v_bar.astype(o_bar.dtype), None, None, beta_bar


_attention.defvjp(_attention_fwd, _attention_bwd)
