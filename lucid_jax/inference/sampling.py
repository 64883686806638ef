"""Sampling of the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from lucid_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Takes the most likely token, or samples from `softmax(logits/temperature)`.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: Samples only from the k most likely tokens; 0 means all.
      top_p: Samples only from the fewest of those tokens that together have this probability;
        1 means all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2³²)"),
        ):
            if not ok:
                raise ConfigError(f"{name} must be {expected}; got {getattr(self, name)}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError(
                "top_k and top_p choose what is sampled, so they need a temperature above 0; got"
                f" top_k={self.top_k}, top_p={self.top_p} at temperature 0"
            )

    def choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Chooses tokens int32 `[B]` from logits `[B,V]` with one random key `[B]` each."""
        if self.temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        draw = jax.vmap(jax.random.categorical)
        # Relative to the largest, which stays 0 at any temperature.
        logits = (logits - logits.max(-1, keepdims=True)) / max(self.temperature, 1e-30)
        if not self.top_k and self.top_p == 1:
            return draw(keys, logits).astype(jnp.int32)
        vocabulary = logits.shape[-1]
        logits, tokens = jax.lax.top_k(logits, min(self.top_k or vocabulary, vocabulary))
        probability = jax.nn.softmax(logits)
        # A token is kept if the more likely ones do not reach `top_p`; the first always is.
        before = jnp.cumsum(probability, -1) - probability
        logits = jnp.where(before < self.top_p, logits, -jnp.inf)
        drawn = draw(keys, logits)
        return jnp.take_along_axis(tokens, drawn[:, None], 1)[:, 0]
