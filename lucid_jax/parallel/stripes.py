"""The order of the tokens of a sequence that is sharded over devices.

A sequence is cut into blocks of `width` tokens that are dealt to the shards in turn: block `g`
lies on shard `g mod shards`, and `shards` consecutive blocks are a stripe. Under a causal mask
every shard then has early and late tokens alike, and a solve that proceeds by stripes keeps all
shards busy. The host puts a batch into this order once; as an array it is the tokens of shard 0,
then those of shard 1, and so on, which a plain sharding splits.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Stripes:
    """Sequences of `length` tokens on `shards` devices, in blocks of `width`.

    One shard keeps sequences as they are: no padding and no permutation, whatever the width.
    """

    length: int
    shards: int
    width: int

    @property
    def size(self) -> int:
        """Tokens of a sequence with the padding that makes its stripes whole."""
        stripe = 1 if self.shards == 1 else self.shards * self.width
        return -(-self.length // stripe) * stripe

    @property
    def count(self) -> int:
        """Stripes of a sequence, which is also the number of blocks of each shard."""
        return self.size // (self.shards * self.width)

    def permutation(self) -> np.ndarray:
        """Returns which token of the padded sequence stands at each place: int64 `[size]`."""
        places = np.arange(self.size)
        if self.shards == 1:
            return places
        return places.reshape(self.count, self.shards, self.width).swapaxes(0, 1).reshape(-1)

    def positions(self, shard: jax.Array | int) -> jax.Array:
        """Returns the positions of the tokens of one shard: ascending int32 `[size/shards]`."""
        if self.shards == 1:
            return jnp.arange(self.size, dtype=jnp.int32)
        block = jnp.arange(self.count, dtype=jnp.int32)[:, None] * self.shards + shard
        return (block * self.width + jnp.arange(self.width, dtype=jnp.int32)).reshape(-1)

    def apply(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pads all arrays `[B,length]` of a batch to `[B,size]`, in the order of the shards.

        Padding is zero, as in packing, but for `positions`, which go on: RoPE then rotates no
        two keys of the padding alike.
        """
        if self.shards == 1:
            return dict(batch)
        padding, order = self.size - self.length, self.permutation()
        after = np.arange(1, padding + 1)

        def arrange(name: str, x: np.ndarray) -> np.ndarray:
            tail = x[:, -1:] + after if name == "positions" else np.zeros((len(x), padding))
            return np.concatenate([x, tail.astype(x.dtype)], 1)[:, order]

        return {name: arrange(name, x) for name, x in batch.items()}

    def restore(self, x: np.ndarray) -> np.ndarray:
        """Turns `[B,size,…]` in the order of the shards into `[B,length,…]` in sequence order."""
        return x[:, np.argsort(self.permutation())[: self.length]]
