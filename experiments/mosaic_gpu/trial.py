"""`precondition` by the Mosaic GPU kernels: one document a sequence, keys of 16 bits, no prefix."""

from __future__ import annotations

from typing import Any

import jax

from lucid_jax.ops.blocks import heads_first, pad_axis, rows_first
from lucid_jax.ops.precondition.gram import key_gradient, normalize_keys
from pallas_kernels.mosaic_gpu.inverse import inverses
from pallas_kernels.mosaic_gpu.key_gradient import key_gradient as scaled_key_gradient
from pallas_kernels.mosaic_gpu.solve import solve
from pallas_kernels.mosaic_gpu.tile import ROWS
from pallas_kernels.scaling import key_gradient_scale, key_scale, largest_exponent

# The parameters of Pallas' interpreter, instead of a GPU; the tests set them.
INTERPRET: Any = None


@jax.custom_vjp
def precondition(k: jax.Array, v: jax.Array) -> jax.Array:
    """`lucid_jax.precondition` of `[B,S,K,D]` in float16 or bfloat16, D at most 128."""
    return _forward(k, v)[0]


def _forward(k, v):
    y = _solve(k, v, reverse=False)
    return y, (k, y)


def _backward(residuals, y_bar):
    k, y = residuals
    d = k.shape[-1]
    v_bar = _solve(k, y_bar, reverse=True)
    k_hat, y_systems, v_bar_systems = map(_systems, (_scaled_keys(k), y, v_bar))
    shift = largest_exponent(d)
    k_hat_bar = scaled_key_gradient(
        k_hat, y_systems, v_bar_systems, shift=shift, scale=key_gradient_scale(d, shift),
        interpret=INTERPRET,
    )  # fmt: skip
    return key_gradient(k, _tokens(k_hat_bar, k)), v_bar


precondition.defvjp(_forward, _backward)


def _solve(k, rhs, *, reverse):
    k_hat, shift = _systems(_scaled_keys(k)), largest_exponent(k.shape[-1])
    terms = inverses(k_hat, shift=shift, interpret=INTERPRET)
    y = solve(
        k_hat, _systems(rhs), terms, shift=shift, programs=_multiprocessors(), reverse=reverse,
        interpret=INTERPRET,
    )  # fmt: skip
    return _tokens(y, k)


def _scaled_keys(k):
    return (normalize_keys(k) * key_scale(k.shape[-1])).astype(k.dtype)


def _systems(x):
    """Turns `[B,S,K,D]` into `[B·K,S',W]`, padded with zeros."""
    x = heads_first(x, ROWS)
    x = x.reshape(-1, *x.shape[2:])
    return pad_axis(x, 2, 64 if x.shape[2] <= 64 else 128)


def _tokens(x, like):
    """Inverts `_systems`."""
    b, s, heads, d = like.shape
    return rows_first(x[..., :d].reshape(b, heads, -1, d), s)


def _multiprocessors() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return 1 if INTERPRET else device.num_cores if device else jax.devices()[0].core_count
