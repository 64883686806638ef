"""Diagnostics of a LUCID layer, from what a training step computes anyway."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.ops.precondition.gram import Keys, gram_tile

# Rows of `A` in the sample: 1/16 of the solve's work at 2048 tokens, and 1/1000 at 131072.
_ROWS = 64


class Sample(NamedTuple):
    """The rows and tokens of sequences that are measured.

    Attributes:
      rows: The positions of the rows of `A` in the sample, ascending.
      segment_ids: int32 `[B,S]`; 0 is padding, which is not measured.
    """

    rows: tuple[int, ...]
    segment_ids: jax.Array


class Diagnostics(NamedTuple):
    """Measures of the correlation of keys and of the size of preconditioned values: float32 `[B]`.

    Attributes:
      off_diagonal: The largest entry of `A` below its diagonal, in the rows of the sample. Near
        1 two keys point the same way and `A` mixes their values with full weight; near `exp(−√D)`
        all keys are orthogonal and `A` is close to the identity. None if no rows were given.
      value_gain: The largest `‖y‖/‖v‖` of a head, at most 2.
    """

    off_diagonal: jax.Array | None
    value_gain: jax.Array


def sampled_rows(length: int) -> tuple[int, ...]:
    """Returns evenly spaced positions in sequences of `length` tokens, at most 64."""
    return tuple(np.unique(np.linspace(0, length - 1, _ROWS).round().astype(int)).tolist())


class Tokens(NamedTuple):
    """Tokens of sequences.

    Attributes:
      k: Their keys `[B,S,K,D]`, after RoPE.
      segment_ids: int32 `[B,S]`; 0 is padding.
      positions: int32 `[S]`.
    """

    k: jax.Array
    segment_ids: jax.Array
    positions: jax.Array

    @classmethod
    def at(cls, k: jax.Array, segment_ids: jax.Array, positions: tuple[int, ...] | None = None):
        """Selects tokens of whole sequences by their positions; None selects all."""
        if positions is None:
            return cls(k, segment_ids, jnp.arange(k.shape[1], dtype=jnp.int32))
        where = jnp.asarray(positions, jnp.int32)
        return cls(k[:, where], segment_ids[:, where], where)


def diagnose(
    rows: Tokens | None, tokens: Tokens, v: jax.Array, y: jax.Array, axis_name: str | None = None
) -> Diagnostics:
    """Measures a layer; no gradient passes.

    Args:
      rows: The rows of the sample; None measures no entries of `A`.
      tokens: All tokens of the sequences, or those of this device.
      v: The tokens' values `[B,S,K,D]`.
      y: Their preconditioned values `[B,S,K,D]`.
      axis_name: The mesh axis that shards the sequences, if one does. Then `value_gain` is
        that of whole sequences, and `off_diagonal` that of the columns of this device.
    """
    rows, tokens, v, y = jax.lax.stop_gradient((rows, tokens, v, y))

    def squares(x: jax.Array) -> jax.Array:
        is_token = (tokens.segment_ids != 0)[..., None, None]
        total = jnp.sum(jnp.square(jnp.where(is_token, x, 0).astype(jnp.float32)), (1, 3))
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    v_squares = squares(v)
    gain = jnp.sqrt(squares(y) / jnp.where(v_squares == 0, 1, v_squares)).max(1)
    if rows is None:
        return Diagnostics(None, gain)
    keys, columns = (Keys.normalize(t.k, t.segment_ids, 1) for t in (rows, tokens))
    below = tokens.positions < rows.positions[:, None]
    counts = below[None] & (rows.segment_ids != 0)[..., None]
    entries = jnp.where(counts[:, None], gram_tile(keys, columns, None), 0)
    return Diagnostics(entries.max((1, 2, 3)).astype(jnp.float32), gain)
