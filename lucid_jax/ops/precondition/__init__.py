"""Preconditioned values `y = A⁻¹ v`: one public function, several backends."""

from lucid_jax.ops.precondition.api import precondition
from lucid_jax.ops.precondition.prefix import Prefix

__all__ = ["Prefix", "precondition"]
