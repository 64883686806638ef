"""Cross-entropy in chunks, so that the logits never exist all at once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lucid_jax.ops.blocks import pad_axis
from lucid_jax.ops.numerics import round_up


def token_losses(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    axis: str | None = None,
    z_loss: float = 0.0,
) -> jax.Array:
    """Computes the negative log-likelihood of every target, in nats.

    Only `B·chunk·V` logits exist at a time, forward and backward; those of 128K tokens over a
    vocabulary of 32000 would take 16 GiB in float32.

    Args:
      x: Hidden states `[B,S,E]` in the compute dtype.
      head: Output embedding `[E,V]`, cast to the dtype of `x` in each chunk, so that its
        gradient accumulates in its own, wider dtype.
      targets: int32 `[B,S]`.
      chunk: Tokens of each sequence at a time.
      axis: Under `shard_map`, the mesh axis over which V is sharded; x and targets are the
        same along it.
      z_loss: ζ of `ζ·(log Σ exp logits)²`, which each loss has in its gradient, not in its value.

    Returns:
      float32 `[B,S]`.
    """

    @jax.checkpoint
    def chunk_losses(head, x, targets):
        logits = _logits(x, head)
        score = _score(logits, targets, axis)
        if axis is None:
            log_z = jax.nn.logsumexp(logits, -1)
        else:
            largest = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), axis)
            shares = jnp.sum(jnp.exp(logits - largest[..., None]), -1)
            norm, score = jax.lax.psum((shares, score), axis)
            log_z = largest + jnp.log(norm)
        if not z_loss:
            return log_z - score
        penalty = z_loss * log_z**2
        return log_z - score + (penalty - jax.lax.stop_gradient(penalty))

    return _by_chunks(lambda *c: chunk_losses(head, *c), x, targets, chunk)


def token_margins(
    x: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int, axis: str | None = None
) -> jax.Array:
    """Computes how far the logit of every target is below the largest one.

    It is 0 where greedy decoding takes the target. Arguments and result as in `token_losses`.
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
    """Applies `f` to `chunk` tokens of every sequence at a time; returns `[B,S]`."""
    b, s, _ = x.shape
    chunk = min(chunk, s)
    size = round_up(s, chunk)

    def chunks(x):
        x = pad_axis(x, 1, size)
        return jnp.moveaxis(x.reshape(b, size // chunk, chunk, *x.shape[2:]), 1, 0)

    values = jax.lax.map(lambda c: f(*c), (chunks(x), chunks(targets)))
    return jnp.moveaxis(values, 0, 1).reshape(b, size)[:, :s]


def _score(logits: jax.Array, targets: jax.Array, axis: str | None) -> jax.Array:
    """Returns the logit of every target `[B,S]`; where V is sharded, 0 on all shards but one."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * logits.shape[-1]
    # A masked sum instead of a gather, so that each shard of V contributes its own part.
    hit = first + jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(hit, logits, 0), -1)


@jax.custom_vjp
def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    """Multiplies `x head` in float32, with operands in the dtype of `x`, also in the backward."""
    return jnp.einsum("bse,ev->bsv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)


def _logits_fwd(x, head):
    return _logits(x, head), (x, head)


def _logits_bwd(residuals, logits_bar):
    x, head = residuals
    # A float32 cotangent would turn both products of the backward pass into float32 ones.
    logits_bar = logits_bar.astype(x.dtype)
    x_bar = jnp.einsum("bsv,ev->bse", logits_bar, head.astype(x.dtype))
    head_bar = jnp.einsum("bse,bsv->ev", x, logits_bar, preferred_element_type=head.dtype)
    return x_bar, head_bar


_logits.defvjp(_logits_fwd, _logits_bwd)
