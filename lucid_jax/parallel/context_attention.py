"""LUCID and softmax attention over rows that are spread over the devices of a mesh axis.

The functions here are called under `shard_map`, on the tokens of one device in the order of
`lucid_jax.parallel.stripes`: C devices, N stripes of C blocks, b rows each, S = N·C·b.

**By heads.** Where C divides K, an all-to-all gives each device whole rows of K/C heads, and
everything runs there as on one device, by the best library.

**By stripes.** Otherwise the keys are gathered, and the solve takes the stripes in order.
At stripe t a device

1. brings its block up to date with stripe t − 1: b rows against C·b columns;
2. gathers what is left of the right-hand sides of the stripe, `v − A y`;
3. meanwhile brings all its later rows up to date with stripe t − 1: nearly all the work,
   the same on every device, and it does not wait for the gather;
4. solves the stripe, C·b rows. All devices do so at once, and each then has all of `y`,
   which the softmax needs, without another gather.

A compiler that may start a gather and go on has step 3 between the start and the end of 2;
that of TPUs does so only where it is asked to (README).

What devices do in step 4 that others do too is C²b/S of their share of the solve, which is
K/H of the attention's. To share the B·K chains out would not shorten it, as they run side
by side anyway, but would put a second exchange on the path that everything waits for. A solve
that looks left, where a block takes in all its past at once, gives the kernels of a step b
rows to share out (4 programs of a GPU for 256); this one gives them all later rows.

On GPUs, step 4 of one head or two, in 16 bits, takes inverses of blocks of up to 2048 rows
where they are faster than its chain. They are made of keys alone, before the loop, of all rows
by every device: w·B·S·K·2048 bytes while a layer is solved, 2 GiB at most.

The backward is the same solve from the last stripe to the first, on rows read backwards, as
`A` is symmetric off its diagonal. The gradient of the keys is parallel in the rows of
a device, against gathered keys, `y` and `v̄`: nothing to reduce. The softmax of its queries
has a share in the gradients of all keys and values; these are summed and scattered, in float32.

Splash attention and the blockwise XLA path do that softmax as it stands, of the rows of a device
among all keys. The libraries of GPUs take whole rows alone: there, where C divides H and is
a multiple of K, it goes **by query heads**. An all-to-all gives each device whole rows of H/C
query heads, which read one key/value head of those that are gathered anyway; the gradients of
that head are the device's share. The work is the same on every device.

**What is sent**, as results on one device of B rows, with w bytes an element; segment ids,
if any, are one all-gather of 4·B·S more:

    LUCID     forward   all-gather      1   K             w·B·S·K·D
                        all-gather      N   residuals     4·B·S·K·D in all
              backward  all-gather      N   residuals     4·B·S·K·D in all
                        reduce-scatter  2   K̄, Ȳ          2·4·B·(S/C)·K·D
    softmax   forward   all-gather      2   K, V          2·w·B·S·K·D
              backward  reduce-scatter  2   K̄, V̄          2·4·B·(S/C)·K·D
    by query heads, more
              each way  all-to-all      2   Q, O          w·B·(S/C)·2H·D
    by heads  each way  all-to-all      4   Q, K, V, O    w·B·(S/C)·(2H + 2K)·D

K and Y stay gathered between forward and backward, 2·w·B·S·K·D bytes, instead of two more
gathers: 134 MB for 131072 tokens of 4 heads of 64. Rematerialisation that keeps the results of
attention keeps this Y of every layer, and sends K, Q and O again; "full" solves again.
"""

from __future__ import annotations

import functools

import jax

from lucid_jax.ops.attention import softmax_attention as _softmax_of_one
from lucid_jax.ops.attention.api import RowsBackend, logits_scale
from lucid_jax.ops.lucid_attention import lucid_attention as _lucid_of_one
from lucid_jax.ops.lucid_attention import softmax_implementation
from lucid_jax.ops.precondition import precondition as _precondition_of_one
from lucid_jax.ops.precondition.block_ops import Pieces, choose_pieces
from lucid_jax.ops.precondition.diagnostics import largest_of_rows
from lucid_jax.ops.precondition.gram import accumulator_dtype
from lucid_jax.ops.query_positions import Rows
from lucid_jax.ops.remat import keep
from lucid_jax.parallel.context_shard import Spread
from lucid_jax.parallel.context_softmax import choose_softmax
from lucid_jax.parallel.context_solve import Sides, solve_gradients, substitute


def lucid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`lucid_jax.lucid_attention` of rows spread over a mesh axis; call it under `shard_map`.

    Args:
      q: Queries of this device `[B,S/C,H,D]`, in the order of `Stripes`.
      k: Keys `[B,S/C,K,D]` of the same dtype; K divides H.
      v: Values `[B,S/C,K,D]` of the same dtype.
      axis_name: The mesh axis, of C devices.
      stripe: b, rows of a block; divides S/C.
      segment_ids: int32 `[B,S/C]`, or None.
      implementation: As in the op of one device; `"reference"` only where C divides K.

    Returns:
      `o [B,S/C,H,D]`, dtype of `q`.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: shapes that do not match, a stripe that does not divide the rows, or an
        implementation that is unknown or cannot run the call.
    """
    spread = Spread.of(axis_name, stripe, q, k, v, segment_ids)
    if spread.by_heads(k):
        op = functools.partial(_lucid_of_one, implementation=implementation)
        return spread.run_by_heads(op, (q, k, v), segment_ids)
    pieces = choose_pieces(implementation, k, stripe)
    softmax = choose_softmax(spread, softmax_implementation(implementation), q, k, segment_ids)
    scale = logits_scale(1.0, q.shape[-1])
    return _lucid(spread, pieces, softmax, scale, q, k, v, segment_ids)


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    segment_ids: jax.Array | None = None,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """`lucid_jax.softmax_attention` of rows spread over a mesh axis, as in `lucid_attention`.

    `implementation` and `temperature` are those of the op of one device; implementations other
    than None, `"splash"` and `"xla"` need whole rows: C divides K, or divides H and is a multiple
    of K.
    """
    spread = Spread.of(axis_name, stripe, q, k, v, segment_ids)
    if spread.by_heads(k):
        op = functools.partial(
            _softmax_of_one, implementation=implementation, temperature=temperature
        )
        return spread.run_by_heads(op, (q, k, v), segment_ids)
    softmax = choose_softmax(spread, implementation, q, k, segment_ids)
    scale = logits_scale(temperature, q.shape[-1])
    return _softmax(spread, softmax, scale, q, k, v, segment_ids)


def precondition(
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`lucid_jax.precondition` of rows spread over a mesh axis, as in `lucid_attention`."""
    spread = Spread.of(axis_name, stripe, k, k, v, segment_ids)
    if spread.by_heads(k):
        op = functools.partial(_precondition_of_one, implementation=implementation)
        return spread.run_by_heads(op, (k, v), segment_ids)
    return _precondition(spread, choose_pieces(implementation, k, stripe), k, v, segment_ids)


def largest_off_diagonal(
    k: jax.Array, *, axis_name: str, stripe: int, segment_ids: jax.Array | None = None
) -> jax.Array:
    """`max_{j<i} A_ij` `[B,K]`, the same on all devices; arguments as in `lucid_attention`."""
    spread = Spread.of(axis_name, stripe, k, k, k, segment_ids)
    ids = None if segment_ids is None else spread.gather(segment_ids)
    rows = Rows(spread.positions(), segment_ids, ids)
    return jax.lax.pmax(largest_of_rows(k, spread.gather(k), rows), axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _lucid(
    spread: Spread, pieces: Pieces, softmax: RowsBackend, scale: float, q, k, v, segment_ids
):
    return _lucid_fwd(spread, pieces, softmax, scale, q, k, v, segment_ids)[0]


def _lucid_fwd(spread, pieces, softmax, scale, q, k, v, segment_ids):
    sides = Sides.of(spread, k, segment_ids)
    y_all = keep(substitute(spread, pieces, sides, v))
    rows = _rows(spread, sides)
    o, attended = softmax.forward(scale, None, q, sides.k_all, y_all, rows)
    return o, (sides, y_all, attended)


def _lucid_bwd(spread, pieces, softmax, scale, residuals, o_bar):
    sides, y_all, attended = residuals
    q_bar, k_bar, y_bar = _attention_gradients(spread, softmax, scale, attended, o_bar)
    k_bar_of_solve, v_bar = solve_gradients(spread, pieces, sides, y_all, y_bar)
    return q_bar, (k_bar + k_bar_of_solve).astype(q_bar.dtype), v_bar, None


_lucid.defvjp(_lucid_fwd, _lucid_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _softmax(spread: Spread, softmax: RowsBackend, scale: float, q, k, v, segment_ids):
    return _softmax_fwd(spread, softmax, scale, q, k, v, segment_ids)[0]


def _softmax_fwd(spread, softmax, scale, q, k, v, segment_ids):
    sides, v_all = Sides.of(spread, k, segment_ids), spread.gather(v)
    return softmax.forward(scale, None, q, sides.k_all, v_all, _rows(spread, sides))


def _softmax_bwd(spread, softmax, scale, attended, o_bar):
    q_bar, *kv_bar = _attention_gradients(spread, softmax, scale, attended, o_bar)
    return q_bar, *(x.astype(q_bar.dtype) for x in kv_bar), None


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _precondition(spread: Spread, pieces: Pieces, k, v, segment_ids):
    return _precondition_fwd(spread, pieces, k, v, segment_ids)[0]


def _precondition_fwd(spread, pieces, k, v, segment_ids):
    sides = Sides.of(spread, k, segment_ids)
    y_all = keep(substitute(spread, pieces, sides, v))
    return spread.own(y_all), (sides, y_all)


def _precondition_bwd(spread, pieces, residuals, y_bar):
    sides, y_all = residuals
    k_bar, v_bar = solve_gradients(spread, pieces, sides, y_all, y_bar)
    return k_bar.astype(y_bar.dtype), v_bar, None


_precondition.defvjp(_precondition_fwd, _precondition_bwd)


def _rows(spread: Spread, sides: Sides) -> Rows:
    return Rows(spread.positions(), sides.segment_ids, sides.segment_ids_all)


def _attention_gradients(spread, softmax, scale, attended, o_bar):
    """`q̄`, and in float32 the gradients of the keys and values of this device."""
    q_bar, *shares = softmax.backward(scale, None, attended, o_bar)
    return q_bar, *(spread.scatter(x.astype(accumulator_dtype(x.dtype))) for x in shares)
