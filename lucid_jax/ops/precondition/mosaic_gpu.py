"""The Mosaic GPU kernels as a backend: what they take, and where they are the fastest."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lucid_jax.ops import target
from lucid_jax.ops.by_batch import by_batch

# The parameters of Pallas' interpreter instead of a GPU; the tests set them.
INTERPRET: Any = None

# The shortest sequences, and the fewest rows of all of them, of which it was measured.
_LONG, _MANY_ROWS = 2**15, 2**19
_HOPPER = re.compile(r"NVIDIA (H100|H200|H800|H20|GH200)\b")


def unsupported(k: jax.Array) -> str | None:
    """Says why the kernels cannot take keys like `k`, or returns None when they can."""
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11 or later; got {jax.__version__}"
    if not INTERPRET and not (target.platform() == "gpu" and _HOPPER.match(target.device_kind())):
        return f"it needs a Hopper GPU; this is compiled for {target.device_kind()}"
    if k.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 or bfloat16; got {k.dtype.name}"
    if k.shape[-1] > 128:
        return f"it needs a head width of at most 128; got {k.shape[-1]}"
    return None


def is_fastest(k: jax.Array) -> bool:
    """Returns whether the kernels are faster than those of Triton (experiments/mosaic_gpu)."""
    b, s, heads, d = k.shape
    # Heads of 64 are as fast, but not backward. Few or short chains wait longer for each block.
    return d > 64 and s >= _LONG and b * s * heads >= _MANY_ROWS


@dataclasses.dataclass(frozen=True)
class MosaicGpuBackend:
    """The kernels for Hopper; see `backend.SequenceBackend`.

    Attributes:
      programs: Programs of the solve, one for each multiprocessor.
      interpret: The parameters of Pallas' interpreter, or None for a GPU.
    """

    isolated: ClassVar[bool] = False

    programs: int
    interpret: Any = None

    @classmethod
    def for_sequences(cls, k: jax.Array, precision: jax.lax.Precision | None) -> MosaicGpuBackend:
        """Makes the backend; `precision` is None."""
        del k, precision
        return cls(1 if INTERPRET else target.core_count(), INTERPRET)

    def forward(
        self, k: jax.Array, rhs: jax.Array, segment_ids: jax.Array | None, beta: jax.Array | None
    ) -> tuple[jax.Array, None]:
        """Solves `A y = rhs`, all in the dtype of `k`; β is None, and there is no residual."""
        del beta
        return by_batch(functools.partial(self._solve, False))(k, rhs, segment_ids), None

    def backward(
        self,
        k: jax.Array,
        y: jax.Array,
        residual: Any,
        segment_ids: jax.Array | None,
        y_bar: jax.Array,
        dtype: jax.typing.DTypeLike,
        beta: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `k̄` and `v̄`, both in the dtype of `k`."""
        del residual, dtype, beta
        # The barrier makes the compiler compute keys and inverses again instead of keeping them.
        k, y_bar = jax.lax.optimization_barrier((k, y_bar))
        return by_batch(self._gradients)(k, y, segment_ids, y_bar)

    # The kernels are imported where they run: jaxlib has what they import for Linux alone.

    def _solve(self, reverse, k, rhs, segment_ids):
        from lucid_jax.ops.precondition.mosaic_gpu_solve import solve

        options = {"programs": self.programs, "interpret": self.interpret}
        return solve(k, rhs, segment_ids, reverse=reverse, **options)

    def _gradients(self, k, y, segment_ids, y_bar):
        from lucid_jax.ops.precondition.mosaic_gpu_solve import gradient_of_keys

        v_bar = self._solve(True, k, y_bar, segment_ids)
        return gradient_of_keys(k, y, v_bar, segment_ids, interpret=self.interpret), v_bar
