"""`jax.vmap` of functions whose kernels have no axis for it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def by_batch(f: Callable) -> Callable:
    """Returns `f`, of arrays `[B,…]`, so that `jax.vmap` makes its axis part of B.

    Mosaic's kernels copy from whole arrays, to which a call can add no axis, and all programs of a
    solve share its semaphores.
    """
    f = jax.custom_batching.custom_vmap(f)

    @f.def_vmap
    def of_mapped(size, is_mapped, *arrays):
        def fold(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = f(*jax.tree.map(fold, arrays, tuple(is_mapped)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return f
