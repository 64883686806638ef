"""`precondition` by the kernels in Triton's own language: bfloat16, one document a sequence."""

from __future__ import annotations

import dataclasses

import jax

from experiments.jax_triton.inverse import diagonal_inverses
from experiments.jax_triton.key_gradient import key_gradient
from experiments.jax_triton.solve import solve
from lucid_jax.ops import target
from lucid_jax.ops.precondition.triton_schedule import Schedule


@jax.custom_vjp
def precondition(k: jax.Array, v: jax.Array) -> jax.Array:
    """`lucid_jax.precondition` of `[B,S,K,D]` in bfloat16, D a power of two from 16 to 128."""
    return _forward(k, v)[0]


def _forward(k, v):
    y, y_scaled = _solve(k, v, reverse=False)
    return y, (k, y, y_scaled)


def _backward(residuals, y_bar):
    k, y, y_scaled = residuals
    v_bar, v_bar_scaled = _solve(k, y_bar, reverse=True)
    schedule = _schedule(k)
    k_hat, _ = diagonal_inverses(k, rows=schedule.solve.rows, multiple=schedule.multiple)
    k_bar = key_gradient(k, k_hat, y, v_bar, y_scaled, v_bar_scaled, tiles=schedule.gradient)
    return k_bar, v_bar


precondition.defvjp(_forward, _backward)


def _solve(k, rhs, *, reverse):
    schedule = _schedule(k)
    k_hat, inverses = diagonal_inverses(k, rows=schedule.solve.rows, multiple=schedule.multiple)
    tiles = schedule.transposed if reverse else schedule.solve
    tiles = dataclasses.replace(tiles, lookahead=0)
    return solve(k_hat, inverses, rhs, k, tiles=tiles, reverse=reverse)


def _schedule(k: jax.Array) -> Schedule:
    return Schedule.choose(target.device_kind(), k.dtype, *k.shape)
