"""Query rows among keys: what each may see, where the two are not one sequence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class QueryPositions(NamedTuple):
    """Where T query rows stand among S keys.

    Attributes:
      positions: int32 `[T]`, ascending: row `t` sees the keys up to `positions[t]`.
      segment_ids: int32 `[B,T]`, or None; rows see only keys of the same id.
      key_segment_ids: int32 `[B,S]`, or None.
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None

    @classmethod
    def all_of(cls, length: int, segment_ids: jax.Array | None) -> QueryPositions:
        """Every row of one sequence among its keys."""
        return cls(jnp.arange(length, dtype=jnp.int32), segment_ids, segment_ids)
