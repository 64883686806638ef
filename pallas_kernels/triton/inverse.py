"""Inverses of unit lower triangular matrices, one program for each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.call import pallas_call
from pallas_kernels.triangular_inverse import invert_unit_lower
from pallas_kernels.triton import tile


@functools.partial(jax.jit, static_argnames="interpret")
def inverses(a: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Returns the inverses of unit lower triangular matrices; reads the strictly lower part of `a`.

    Args:
      a: `[M,R,R]` float32, R a power of two from 16 to 64.
      interpret: Whether to run in Pallas' interpreter.

    Returns:
      `[M,R,R]` float32, zero above the diagonal.
    """
    return pallas_call(
        _invert,
        grid=(a.shape[0],),
        out_shape=jax.ShapeDtypeStruct(a.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="lucid_inverses",
    )(a)


def _invert(a_ref, out_ref):
    i = pl.program_id(0)
    plgpu.store(out_ref.at[i], invert_unit_lower(plgpu.load(a_ref.at[i]), tile.dot))
