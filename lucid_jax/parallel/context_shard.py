"""Rows that are spread over the devices of a mesh axis, in stripes: what moves between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lucid_jax.ops import check
from lucid_jax.ops.blocks import take
from lucid_jax.parallel.stripes import Stripes


@dataclasses.dataclass(frozen=True)
class ContextShard:
    """Rows over the devices of a mesh axis, in stripes; arrays are `[B,S/C,…]` or `[B,S,…]`."""

    axis: str
    stripes: Stripes

    @classmethod
    def of(
        cls,
        axis_name: str,
        stripe: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segment_ids: jax.Array | None,
    ) -> ContextShard:
        """That of checked arguments of an op: the rows of one device.

        Raises:
          TypeError: a dtype that is not supported or does not match.
          ValueError: shapes that do not match, or a stripe that does not divide the rows.
        """
        b, s, h, d = check.shape("q", q, "BSHD")
        check.float_dtype("q", q)
        *_, kv_heads, _ = check.shape("k", k, "BSKD")
        check.same("k", k, "BSKD", (b, s, kv_heads, d), q.dtype)
        check.same("v", v, "BSKD", (b, s, kv_heads, d), q.dtype)
        if h % kv_heads:
            raise ValueError(f"H must be a multiple of K; got H={h} query heads, K={kv_heads}")
        if segment_ids is not None:
            check.same("segment_ids", segment_ids, "BS", (b, s), jnp.int32)
        if stripe < 1 or s % stripe:
            raise ValueError(f"stripe must divide the {s} rows of a device; got {stripe}")
        shards = jax.lax.axis_size(axis_name)
        return cls(axis_name, Stripes(s * shards, shards, stripe))

    def positions(self) -> jax.Array:
        """int32 `[S/C]`: where the rows of this device stand."""
        return self.stripes.positions(jax.lax.axis_index(self.axis))

    def gather(self, x: jax.Array) -> jax.Array:
        """All rows in their order, from those of each device."""
        blocks = x.reshape(x.shape[0], self.stripes.count, self.stripes.width, *x.shape[2:])
        whole = jax.lax.all_gather(blocks, self.axis, axis=2, tiled=True)
        return whole.reshape(x.shape[0], self.stripes.size, *x.shape[2:])

    def scatter(self, x: jax.Array) -> jax.Array:
        """The sums over devices of the rows of each, from shares `[B,S,…]`."""
        blocks = self._in_stripes(x)
        blocks = jax.lax.psum_scatter(blocks, self.axis, scatter_dimension=2, tiled=True)
        return blocks.reshape(x.shape[0], -1, *x.shape[2:])

    def own(self, x: jax.Array) -> jax.Array:
        """The rows of this device, of all."""
        start = jax.lax.axis_index(self.axis) * self.stripes.width
        return take(self._in_stripes(x), start, self.stripes.width, 2).reshape(
            x.shape[0], -1, *x.shape[2:]
        )

    def _in_stripes(self, x: jax.Array) -> jax.Array:
        stripe = self.stripes.shards * self.stripes.width
        return x.reshape(x.shape[0], self.stripes.count, stripe, *x.shape[2:])

    def to_heads(self, x: jax.Array) -> jax.Array:
        """All rows in their order of some heads `[B,S,heads/C,D]`, from `[B,S/C,heads,D]`."""
        b, s, _, d = x.shape
        n, shards, width = self.stripes.count, self.stripes.shards, self.stripes.width
        x = x.reshape(b, n, width, shards, -1, d)
        x = jax.lax.all_to_all(x, self.axis, split_axis=3, concat_axis=2, tiled=True)
        return x.reshape(b, s * shards, -1, d)

    def to_rows(self, x: jax.Array) -> jax.Array:
        """The inverse of `to_heads`."""
        b, s, _, d = x.shape
        n, shards, width = self.stripes.count, self.stripes.shards, self.stripes.width
        x = x.reshape(b, n, shards * width, 1, -1, d)
        x = jax.lax.all_to_all(x, self.axis, split_axis=2, concat_axis=3, tiled=True)
        return x.reshape(b, s // shards, -1, d)

    def by_heads(self, k: jax.Array) -> bool:
        """Whether every device can have whole rows of some heads instead."""
        return k.shape[2] % self.stripes.shards == 0

    def by_query_heads(self, q: jax.Array, k: jax.Array) -> bool:
        """Whether every device can have whole rows of query heads that read one key head."""
        shards = self.stripes.shards
        return q.shape[2] % shards == 0 and shards % k.shape[2] == 0

    def run_by_heads(
        self,
        op: Callable[..., jax.Array],
        arrays: Sequence[jax.Array],
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """`op` of whole rows of the heads of each device; arrays are `[B,S/C,heads,D]`."""
        ids = None if segment_ids is None else self.gather(segment_ids)
        return self.to_rows(op(*map(self.to_heads, arrays), segment_ids=ids))
