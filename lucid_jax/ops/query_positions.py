"""Positions of query tokens among keys, where the queries are a subset of the sequence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class QueryPositions(NamedTuple):
    """The positions of T query tokens among S keys.

    Attributes:
      positions: int32 `[T]`, ascending: query `t` sees the keys up to `positions[t]`.
      segment_ids: int32 `[B,T]`, or None; a query sees only keys of the same id.
      key_segment_ids: int32 `[B,S]`, or None.
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None

    @classmethod
    def whole_sequence(cls, length: int, segment_ids: jax.Array | None) -> QueryPositions:
        """Places a query at every key."""
        return cls(jnp.arange(length, dtype=jnp.int32), segment_ids, segment_ids)
