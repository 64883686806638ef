"""Rematerialisation: marks attention's results, which are small but cost S² to recompute."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

ATTENTION_RESULT = "attention"
# cuDNN's flash attention: its backward pass reads results that the library does not name.
_LIBRARY_PRIMITIVES = ("dot_product_attention_fwd_wrapper",)


def save_for_backward(x: jax.Array) -> jax.Array:
    """Marks a result of a forward rule that the backward pass needs."""
    return checkpoint_name(x, ATTENTION_RESULT)


def saves_attention(primitive: Primitive, *_: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint` that saves the marked results and nothing else."""
    if primitive.name == "name":
        return params["name"] == ATTENTION_RESULT
    return primitive.name in _LIBRARY_PRIMITIVES
