"""Cross-entropy whose logits never exist all at once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import pad_axis, round_up


def token_losses(
    x: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int, axis: str | None = None
) -> jax.Array:
    """Negative log-likelihood of every target, in nats.

    Only `B·chunk·V` logits exist at a time, forward and backward: 128K tokens of 32000
    pieces would be 16 GiB of float32 otherwise.

    Args:
      x: Hidden states `[B,S,E]` in the compute dtype.
      head: Output embedding `[E,V]`, cast to the dtype of `x` chunk by chunk so that its
        gradient accumulates in its own, wider dtype.
      targets: int32 `[B,S]`.
      chunk: Tokens of a row at a time.
      axis: Under `shard_map`, the mesh axis over which V is split; x and targets are the
        same along it.

    Returns:
      float32 `[B,S]`.
    """

    @jax.checkpoint
    def chunk_losses(head, x, targets):
        logits = _logits(x, head)
        score = _score(logits, targets, axis)
        if axis is None:
            return jax.nn.logsumexp(logits, -1) - score
        largest = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), axis)
        norm, score = jax.lax.psum((jnp.sum(jnp.exp(logits - largest[..., None]), -1), score), axis)
        return largest + jnp.log(norm) - score

    return _by_chunks(lambda *c: chunk_losses(head, *c), x, targets, chunk)


def token_margins(
    x: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int, axis: str | None = None
) -> jax.Array:
    """How far the logit of every target is below the largest: 0 where greedy decoding takes it.

    Arguments and result are those of `token_losses`.
    """

    def chunk_margins(x, targets):
        logits = _logits(x, head)
        score, largest = _score(logits, targets, axis), logits.max(-1)
        if axis is not None:
            score, largest = jax.lax.psum(score, axis), jax.lax.pmax(largest, axis)
        return largest - score

    return _by_chunks(chunk_margins, x, targets, chunk)


def _by_chunks(
    f: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, targets: jax.Array, chunk: int
) -> jax.Array:
    """`f` of `chunk` tokens of every row at a time, `[B,S]`."""
    b, s, _ = x.shape
    chunk = min(chunk, s)
    size = round_up(s, chunk)

    def chunks(x):
        x = pad_axis(x, 1, size)
        return jnp.moveaxis(x.reshape(b, size // chunk, chunk, *x.shape[2:]), 1, 0)

    values = jax.lax.map(lambda c: f(*c), (chunks(x), chunks(targets)))
    return jnp.moveaxis(values, 0, 1).reshape(b, size)[:, :s]


def _score(logits: jax.Array, targets: jax.Array, axis: str | None) -> jax.Array:
    """The logit of every target `[B,S]`; where V is split, 0 on all shards but one."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * logits.shape[-1]
    # A masked sum instead of a gather: each shard of V adds what it has.
    hit = first + jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(hit, logits, 0), -1)


@jax.custom_vjp
def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    """`x head` in float32, of operands in the dtype of `x`, forward and backward."""
    return jnp.einsum("bse,ev->bsv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)


def _logits_fwd(x, head):
    return _logits(x, head), (x, head)


def _logits_bwd(residuals, logits_bar):
    x, head = residuals
    # Left in float32, it would make products of float32 of the two in the backward pass.
    logits_bar = logits_bar.astype(x.dtype)
    x_bar = jnp.einsum("bsv,ev->bse", logits_bar, head.astype(x.dtype))
    head_bar = jnp.einsum("bse,bsv->ev", x, logits_bar, preferred_element_type=head.dtype)
    return x_bar, head_bar


_logits.defvjp(_logits_fwd, _logits_bwd)
