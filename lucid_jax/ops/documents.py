"""Documents of packed sequences, as ranges of rows that depend on no other.

A document here is a range of tokens whose segments have no token outside of it. Where each segment
is one run of tokens, every run is a document. Otherwise the whole sequence counts as one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.numerics import round_up

# Tokens of a sequence whose ids are not sorted.
_SHORT = 8192


class Entering(NamedTuple):
    """The document that enters each block of rows from the block before: int32 `[B,N]`.

    Attributes:
      start: The first row of that document; the first row of the block where none enters it.
      size: The rows of the block that belong to it.
    """

    start: jax.Array
    size: jax.Array


def entering_documents(segment_ids: jax.Array, rows: int, *, reverse: bool = False) -> Entering:
    """Finds the documents that enter blocks of `rows` rows.

    Args:
      segment_ids: int32 `[B,N·rows]`.
      rows: Rows of a block.
      reverse: Whether rows and blocks are counted from the end of the sequence.
    """
    starts = _run_starts(jnp.flip(segment_ids, 1) if reverse else segment_ids)
    first = jnp.arange(starts.shape[1], dtype=jnp.int32)[None] == 0
    return _entering(starts & (is_contiguous(segment_ids)[:, None] | first), rows)


def entering_runs(segment_ids: jax.Array, rows: int, *, reverse: bool = False) -> Entering:
    """Finds the runs of one segment that enter blocks; arguments as in `entering_documents`."""
    return _entering(_run_starts(jnp.flip(segment_ids, 1) if reverse else segment_ids), rows)


def _run_starts(ids: jax.Array) -> jax.Array:
    """Returns which tokens differ from the one before: bool `[B,S]`."""
    return jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], 1)


def is_contiguous(ids: jax.Array) -> jax.Array:
    """Returns which sequences have one run for each id: bool `[B]`.

    Short sequences count as such only where ids ascend, but for a last run with a lower id, such as
    padding: to sort them would take longer than the blocks of their documents wait.
    """
    falls = jnp.sum(ids[:, 1:] < ids[:, :-1], 1, dtype=jnp.int32)
    ascend = falls + (ids[:, 0] <= ids[:, -1]).astype(jnp.int32) == 1
    if ids.shape[1] <= _SHORT:
        return ascend
    # An id of several runs starts more runs than there are different ids.
    runs, different = (_run_starts(x).sum(1, dtype=jnp.int32) for x in (ids, jnp.sort(ids, axis=1)))
    return runs == different


def _entering(starts: jax.Array, rows: int) -> Entering:
    """Finds what enters blocks, from where it starts: bool `[B,S]`."""
    b, length = starts.shape
    starts = starts.reshape(b, -1, rows)
    row = jnp.arange(rows, dtype=jnp.int32)[None, None]
    block = jnp.arange(length // rows, dtype=jnp.int32)
    size = jnp.where(starts, row, rows).min(2)
    last = jnp.where(starts, row + block[None, :, None] * rows, -1).max(2)
    before = jnp.where((block[None] < block[:, None])[None], last[:, None], -1).max(2)
    return Entering(jnp.where(size > 0, before, block[None] * rows), size)


def order_by_depth(entering: Entering, rows: int) -> jax.Array:
    """Orders the work of a blockwise substitution so that documents are solved side by side.

    A block is two items: that of the rows of the document which enters it, and that of its other
    rows, which depend on no earlier block. An item follows all that it depends on.

    Args:
      entering: The documents that enter each block.
      rows: Rows of a block.

    Returns:
      int32 `[B,2N]`: block `n` of the first kind is item `n`, of the second kind item `N + n`.
      Items without rows come last.
    """
    n = entering.start.shape[1]
    depth = jnp.arange(n, dtype=jnp.int32)[None] - entering.start // rows
    first = jnp.where(entering.size > 0, depth, n)
    rest = jnp.where(entering.size < rows, 0, n)
    order = jnp.argsort(jnp.concatenate([first, rest], 1), axis=1, stable=True)
    return order.astype(jnp.int32)


def pad_segments(segment_ids: jax.Array, multiple: int) -> jax.Array:
    """Pads segment ids `[B,S]` with the last one, so that padding is no document of its own."""
    length = segment_ids.shape[1]
    return jnp.pad(segment_ids, ((0, 0), (0, round_up(length, multiple) - length)), mode="edge")
