"""Transitions of PaTH attention (Yang et al., arXiv 2505.16381), which take the place of RoPE.

Each token t has a transition `H_t = I − β_t w_t w_tᵀ` with `‖w_t‖ = 1`. The score of query i and
key j is `s_ij = q_iᵀ (H_i H_{i−1} ⋯ H_{j+1}) k_j` for `j ≤ i`, where the product runs over the
tokens of their segment. PaTH attention is the softmax of `s/√D`; LUCID-PaTH (arXiv 2602.10410)
also has scores of normalised keys in the exponent of `A`.

## The bound

`‖A⁻¹‖₂ ≤ 2` holds for `A_ij = exp(s_ij/√D − √D)`, with `s` of the normalised keys, for any keys,
any directions and any `β_t ∈ [0, 2]`.

`H_t` is symmetric with eigenvalues 1 and `1 − β_t`, so `I − H_t² ⪰ 0`. Take a process with `x_0` of
covariance `I` and `x_t = H_t x_{t−1} + n_t`, where the noise `n_t` is independent of the past and
has covariance `I − H_t²`. Every `x_t` then has covariance `I`, and `E[x_i x_jᵀ] = H_i ⋯ H_{j+1}`
for `j ≤ i`. So `s`, extended by its transpose above the diagonal, is the covariance matrix of the
numbers `k̂_i·x_i`: positive semidefinite, with diagonal `‖k̂_i‖² ≤ D`. By Schur's product theorem
its exponential, entry by entry, is positive semidefinite too. Times `e^(−√D)` its diagonal is at
most 1; raising it to 1 gives a positive semidefinite `M`, whose lower triangle is `A`. Hence
`(A + Aᵀ)/2 = (M + I)/2 ⪰ I/2`, and no singular value of `A` is below 1/2.

Outside of [0, 2] a transition makes vectors longer, and there is no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from lucid_jax.ops import check, isolation


class Transitions(NamedTuple):
    """The transitions `H_t = I − β_t w_t w_tᵀ` of all tokens, shared by the queries of a group.

    Attributes:
      w: Directions `[B,S,K,D]`, dtype of the keys. The ops normalise them, in float32; a zero
        direction makes `H_t = I`.
      beta: `β [B,S,K]` in [0, 2], dtype of the keys: 0 is the identity, 1 a projection, 2 a
        reflection. The range is not checked, because values may be traced; outside of it
        results may overflow.
    """

    w: jax.Array
    beta: jax.Array

    def bad_tokens(self) -> jax.Array:
        """Returns whether any entry of a token is not finite: bool `[B,S,K]`."""
        return isolation.bad_tokens(self.w, self.beta[..., None])

    def map(self, f: Callable[..., jax.Array], *arguments: jax.Array) -> Transitions:
        """Returns the transitions after a function of arrays `[B,S,K,…]`, as `isolation` has."""
        return Transitions(f(self.w, *arguments), f(self.beta[..., None], *arguments)[..., 0])


def check_transitions(
    transitions: Transitions, k: jax.Array, axes: str = "BSKD", name: str = "transitions"
) -> None:
    """Raises unless the transitions fit keys of these axes."""
    if not isinstance(transitions, Transitions):
        raise TypeError(f"{name} must be Transitions; got {type(transitions).__name__}")
    check.same(f"{name}.w", transitions.w, axes, k.shape, k.dtype)
    check.same(f"{name}.beta", transitions.beta, axes[:-1], k.shape[:-1], k.dtype)


def for_transitions(reasons: Mapping[str, str | None]) -> dict[str, str | None]:
    """Returns why each backend of `reasons` cannot run a call with transitions, or None."""
    none = "it takes no transitions"
    return {name: reason if name == "triton" else none for name, reason in reasons.items()}
