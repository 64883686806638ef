"""The inputs of a layer's attention: queries, keys, values, and those that a variant adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lucid_jax.ops import differential
from lucid_jax.ops.short_convolution import short_convolution
from lucid_jax.ops.transitions import Transitions

# Tokens that the convolution of PaTH reads.
CONVOLUTION_WIDTH = 3


class Directions(NamedTuple):
    """The arrays that the transitions of PaTH are made from (Yang et al., arXiv 2505.16381).

    Attributes:
      projected: Projections of the layer's input `[B,T,K,D]`, in the compute dtype.
      taps: The filters of the convolution over them, `[W,K,D]`.
      beta: `β [B,T,K]` in [0, 2], in the compute dtype.
    """

    projected: jax.Array
    taps: jax.Array
    beta: jax.Array

    def transitions(
        self, *, convolve: Callable[..., jax.Array] = short_convolution, **arguments: Any
    ) -> Transitions:
        """Convolves the projections by `short_convolution`, whose arguments it takes."""
        w = convolve(self.projected, self.taps, **arguments)
        # The SiLU is known from the authors' code alone, flash-linear-attention, whose short
        # convolutions end in one by default. The ops normalise the directions.
        return Transitions(jax.nn.silu(w).astype(self.projected.dtype), self.beta)


class Inputs(NamedTuple):
    """The inputs of a layer's attention.

    Attributes:
      q: Queries `[B,T,H,D]`.
      k: Keys `[B,T,K,D]`.
      v: Values `[B,T,K,D]`.
      mixing: The parameters of differential attention, if the model has such layers.
      beta: The learnt β of LUCID, float32 `[B,T,K]`, if the model has it.
      directions: What the transitions are made of in a PaTH model.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mixing: differential.Mixing | None
    beta: jax.Array | None
    directions: Directions | None
