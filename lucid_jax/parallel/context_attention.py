"""LUCID and softmax attention over rows that are shard over the devices of a mesh axis.

The functions here are called under `shard_map`, on the tokens of one device in the order of
`lucid_jax.parallel.stripes`: C devices, N stripes of C blocks, b rows each, S = N·C·b.

**By heads.** Where C divides K, an all-to-all gives each device whole rows of K/C heads, and
everything runs there as on one device, by the best library.

**By stripes.** Otherwise the keys are gathered, and the solve takes the stripes in order.
At stripe t a device

1. brings its block up to date with stripe t − 1: b rows against C·b columns;
2. gathers what is left of the right-hand gathered of the stripe, `v − A y`;
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
from lucid_jax.ops.attention.api import SubsetBackend, logits_scale
from lucid_jax.ops.lucid_attention import lucid_attention as _lucid_of_one
from lucid_jax.ops.lucid_attention import softmax_implementation
from lucid_jax.ops.precondition import precondition as _precondition_of_one
from lucid_jax.ops.precondition.block_ops import BlockOps, choose_block_ops
from lucid_jax.ops.precondition.diagnostics import largest_of_rows
from lucid_jax.ops.precondition.gram import accumulator_dtype
from lucid_jax.ops.query_positions import QueryPositions
from lucid_jax.ops.remat import save_for_backward
from lucid_jax.parallel.context_shard import ContextShard
from lucid_jax.parallel.context_softmax import choose_softmax
from lucid_jax.parallel.context_solve import GatheredKeys, solve_gradients, substitute


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
    """`lucid_jax.lucid_attention` of rows shard over a mesh axis; call it under `shard_map`.

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
    shard = ContextShard.of(axis_name, stripe, q, k, v, segment_ids)
    if shard.by_heads(k):
        op = functools.partial(_lucid_of_one, implementation=implementation)
        return shard.run_by_heads(op, (q, k, v), segment_ids)
    block_ops = choose_block_ops(implementation, k, stripe)
    softmax = choose_softmax(shard, softmax_implementation(implementation), q, k, segment_ids)
    scale = logits_scale(1.0, q.shape[-1])
    return _lucid(shard, block_ops, softmax, scale, q, k, v, segment_ids)


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
    """`lucid_jax.softmax_attention` of rows shard over a mesh axis, as in `lucid_attention`.

    `implementation` and `temperature` are those of the op of one device; implementations other
    than None, `"splash"` and `"xla"` need whole rows: C divides K, or divides H and is a multiple
    of K.
    """
    shard = ContextShard.of(axis_name, stripe, q, k, v, segment_ids)
    if shard.by_heads(k):
        op = functools.partial(
            _softmax_of_one, implementation=implementation, temperature=temperature
        )
        return shard.run_by_heads(op, (q, k, v), segment_ids)
    softmax = choose_softmax(shard, implementation, q, k, segment_ids)
    scale = logits_scale(temperature, q.shape[-1])
    return _softmax(shard, softmax, scale, q, k, v, segment_ids)


def precondition(
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    stripe: int,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`lucid_jax.precondition` of rows shard over a mesh axis, as in `lucid_attention`."""
    shard = ContextShard.of(axis_name, stripe, k, k, v, segment_ids)
    if shard.by_heads(k):
        op = functools.partial(_precondition_of_one, implementation=implementation)
        return shard.run_by_heads(op, (k, v), segment_ids)
    return _precondition(shard, choose_block_ops(implementation, k, stripe), k, v, segment_ids)


def largest_off_diagonal(
    k: jax.Array, *, axis_name: str, stripe: int, segment_ids: jax.Array | None = None
) -> jax.Array:
    """`max_{j<i} A_ij` `[B,K]`, the same on all devices; arguments as in `lucid_attention`."""
    shard = ContextShard.of(axis_name, stripe, k, k, k, segment_ids)
    ids = None if segment_ids is None else shard.gather(segment_ids)
    rows = QueryPositions(shard.positions(), segment_ids, ids)
    return jax.lax.pmax(largest_of_rows(k, shard.gather(k), rows), axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _lucid(
    shard: ContextShard,
    block_ops: BlockOps,
    softmax: SubsetBackend,
    scale: float,
    q,
    k,
    v,
    segment_ids,
):
    return _lucid_fwd(shard, block_ops, softmax, scale, q, k, v, segment_ids)[0]


def _lucid_fwd(shard, block_ops, softmax, scale, q, k, v, segment_ids):
    gathered = GatheredKeys.of(shard, k, segment_ids)
    y_all = save_for_backward(substitute(shard, block_ops, gathered, v))
    rows = _rows(shard, gathered)
    o, attended = softmax.forward(scale, None, q, gathered.k_all, y_all, rows)
    return o, (gathered, y_all, attended)


def _lucid_bwd(shard, block_ops, softmax, scale, residuals, o_bar):
    gathered, y_all, attended = residuals
    q_bar, k_bar, y_bar = _attention_gradients(shard, softmax, scale, attended, o_bar)
    k_bar_of_solve, v_bar = solve_gradients(shard, block_ops, gathered, y_all, y_bar)
    return q_bar, (k_bar + k_bar_of_solve).astype(q_bar.dtype), v_bar, None


_lucid.defvjp(_lucid_fwd, _lucid_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _softmax(shard: ContextShard, softmax: SubsetBackend, scale: float, q, k, v, segment_ids):
    return _softmax_fwd(shard, softmax, scale, q, k, v, segment_ids)[0]


def _softmax_fwd(shard, softmax, scale, q, k, v, segment_ids):
    gathered, v_all = GatheredKeys.of(shard, k, segment_ids), shard.gather(v)
    return softmax.forward(scale, None, q, gathered.k_all, v_all, _rows(shard, gathered))


def _softmax_bwd(shard, softmax, scale, attended, o_bar):
    q_bar, *kv_bar = _attention_gradients(shard, softmax, scale, attended, o_bar)
    return q_bar, *(x.astype(q_bar.dtype) for x in kv_bar), None


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _precondition(shard: ContextShard, block_ops: BlockOps, k, v, segment_ids):
    return _precondition_fwd(shard, block_ops, k, v, segment_ids)[0]


def _precondition_fwd(shard, block_ops, k, v, segment_ids):
    gathered = GatheredKeys.of(shard, k, segment_ids)
    y_all = save_for_backward(substitute(shard, block_ops, gathered, v))
    return shard.own(y_all), (gathered, y_all)


def _precondition_bwd(shard, block_ops, residuals, y_bar):
    gathered, y_all = residuals
    k_bar, v_bar = solve_gradients(shard, block_ops, gathered, y_all, y_bar)
    return k_bar.astype(y_bar.dtype), v_bar, None


_precondition.defvjp(_precondition_fwd, _precondition_bwd)


def _rows(shard: ContextShard, gathered: GatheredKeys) -> QueryPositions:
    return QueryPositions(shard.positions(), gathered.segment_ids, gathered.segment_ids_all)


def _attention_gradients(shard, softmax, scale, attended, o_bar):
    """`q̄`, and in float32 the gradients of the keys and values of this device."""
    q_bar, *shares = softmax.backward(scale, None, attended, o_bar)
    return q_bar, *(shard.scatter(x.astype(accumulator_dtype(x.dtype))) for x in shares)
