"""Persistent programs: one on each multiprocessor draws items of work, one after the other.

The group that copies draws an item while the others compute the one before, and loads its tiles as
buffers become free. So only the first item of a program waits for its first tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tile


class Queue(NamedTuple):
    """Hands items, which are int32 numbers that are not negative, to the groups that compute.

    Attributes:
      numbers: The number drawn last, and the item sent last, in shared memory.
      sent: The barrier of an item that was sent.
      received: The barrier of an item that both groups have received.
    """

    numbers: Any
    sent: Any
    received: Any

    @staticmethod
    def scratch(fields: int) -> tuple[Any, ...]:
        """Returns the types of the attributes, for items of so many numbers."""
        numbers = plgpu.SMEM((1 + fields,), jnp.int32)
        return numbers, tile.barriers(1), tile.barriers(1, tile.GROUPS)

    @staticmethod
    def counter(interpret: Any) -> Any:
        """Returns the semaphores that count the items of a kernel, zero before every call.

        In Pallas' interpreter, which has none and runs one program, they are None.
        """
        return None if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR((1,)))

    def compute(self, visit: Callable[[Sequence[jax.Array], jax.Array], jax.Array]) -> None:
        """Computes all items, in a group that computes.

        Args:
          visit: Computes an item, after so many tiles of others; returns the number of its tiles.
        """

        def receive():
            plgpu.barrier_wait(self.sent)
            item = tuple(self.numbers[1 + i] for i in range(self.numbers.shape[0] - 1))
            plgpu.barrier_arrive(self.received)
            return item

        def step(carry):
            item, before = carry
            before += visit(item, before)
            return receive(), before

        jax.lax.while_loop(lambda carry: carry[0][0] >= 0, step, (receive(), jnp.int32(0)))

    def copy(
        self,
        counter: Any,
        count: int,
        find: Callable[[jax.Array], Sequence[jax.Array]],
        load: Callable[[Sequence[jax.Array], jax.Array], jax.Array],
    ) -> jax.Array:
        """Draws and loads all items, in the group that copies; returns the number of all tiles.

        Args:
          counter: The semaphores.
          count: The number of items of all programs.
          find: Returns the item of a number.
          load: Loads an item, after so many tiles of others; returns the number of its tiles.
        """

        def draw(number):
            if counter is None:
                return number + 1
            tile.draw(counter, self.numbers)
            return jax.lax.axis_size("axis0") + self.numbers[0]

        def send(item, before):
            pl.when(before > 0)(lambda: plgpu.barrier_wait(self.received))
            for i, x in enumerate(item):
                self.numbers[1 + i] = x
            plgpu.barrier_arrive(self.sent)

        def step(carry):
            number, before = carry
            item = find(number)
            send(item, before)
            before += load(item, before)
            return draw(number), before

        first = jax.lax.axis_index("axis0"), jnp.int32(0)
        _, before = jax.lax.while_loop(lambda carry: carry[0] < count, step, first)
        send([jnp.int32(-1)], before)
        # A barrier must not end with a phase that nobody has waited for.
        plgpu.barrier_wait(self.received)
        return before
