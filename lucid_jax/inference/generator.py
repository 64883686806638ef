"""Completions of prompts: batches of any lengths in a few compiled shapes."""

from __future__ import annotations

import collections
import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.inference.decoder import Decoder, DecoderParams
from lucid_jax.inference.kv_cache import Cache
from lucid_jax.inference.sampling import Sampling
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.ops.blocks import round_up

# Tokens of a row between two looks of the host.
BLOCK = 16
# Tokens of all prompts that a device takes at a time: what bounds the memory of activations.
_PREFILL_TOKENS = 65_536
_SMALLEST = 64

_GREEDY = Sampling()

Finished = Callable[[int, list[int]], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Between two tokens.

    Attributes:
      cache: Of all tokens but the last of each row.
      lengths: int32 `[B]`, tokens in the cache.
      tokens: int32 `[B]`, the last ones.
      done: bool `[B]`: rows that stay as they are.
      keys: Random keys `[B]`.
    """

    cache: Cache
    lengths: jax.Array
    tokens: jax.Array
    done: jax.Array
    keys: jax.Array


class Generator:
    """Completes prompts with one model; keeps what it compiled between calls."""

    def __init__(
        self,
        model: LanguageModel,
        params: Any,
        end_ids: Collection[int] = (),
        sampling: Sampling = _GREEDY,
        *,
        max_length: int | None = None,
        chunk: int | None = None,
    ):
        """Copies the parameters in the compute dtype.

        Args:
          model: Its structure; rows go over `data` and `fsdp`, heads over `tensor`, and the
            tokens of a cache over `context`.
          params: Of the model, as training has them; not needed afterwards.
          end_ids: Tokens that end a completion.
          sampling: How tokens are chosen.
          max_length: The most tokens of a prompt and its completion; None is any number.
          chunk: Tokens of a prompt at a time; None takes what fits the memory. Where devices
            share a row it is always the whole prompt.

        Raises:
          ConfigError: an end that is no token of the vocabulary, or a chunk below 1.
        """
        for token in end_ids:
            _check_token("an end", token, model.config.vocab_size)
        if chunk is not None and chunk < 1:
            raise ConfigError(f"chunk must be positive; got {chunk}")
        self._config, self._layout, self._sampling = model.config, model.layout, sampling
        self._max_length, self._chunk = max_length, chunk
        self._end_ids = frozenset(end_ids)
        self._decoder = Decoder(model)
        self._params = jax.jit(self._decoder.prepare)(params)
        self._empty = jax.jit(self._decoder.attention.empty, static_argnums=(0, 1))
        self._prefill = jax.jit(self._prefill_chunk, donate_argnums=1)
        self._first = jax.jit(self._first_token, donate_argnums=1)
        self._steps = jax.jit(self._run_steps, donate_argnums=1)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        finished: Finished | None = None,
    ) -> list[list[int]]:
        """The completions, in the order of the prompts, without prompt and end.

        All prompts are one batch. A sample depends on the seed, its prompt, and how many
        equal prompts come before it; not on the others.

        Args:
          prompts: Token ids of each, at least one.
          max_new_tokens: Of each completion.
          finished: Asked every few tokens, with the index of a prompt and its completion so
            far, whether to end it there.

        Raises:
          ConfigError: an empty prompt, one with a token that is not in the vocabulary, or one
            that is too long for `max_length`.
        """
        self._check(prompts, max_new_tokens)
        if not prompts:
            return []
        ids: list[list[int]] = [[] for _ in prompts]
        state = self._read_prompts(prompts, max_new_tokens)
        # Rows that only fill the batch are done from the start.
        done = np.arange(state.done.shape[0]) >= len(prompts)
        tokens = jax.device_get(state.tokens)[:, None]
        made = 1
        while True:
            for i, row in enumerate(ids):
                if not done[i]:
                    done[i] = self._take(row, tokens[i], finished, i)
            left = max_new_tokens - made
            if left == 0 or done.all():
                return ids
            count = min(left, BLOCK)
            state, tokens = self._steps(self._params, state, done, np.int32(count))
            tokens = jax.device_get(tokens)[:, :count]
            made += count

    def _take(self, row: list[int], tokens: np.ndarray, finished: Finished | None, i: int) -> bool:
        """Adds new tokens to a completion, up to an end; whether it is done."""
        for token in tokens.tolist():
            if token in self._end_ids:
                return True
            row.append(token)
        return finished is not None and finished(i, row)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be positive; got {max_new_tokens}")
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ConfigError(f"prompt {i} is empty: there is nothing to go on from")
            for token in (min(prompt), max(prompt)):
                _check_token(f"prompt {i}", token, self._config.vocab_size)
            size = len(prompt) + max_new_tokens
            if self._max_length is not None and size > self._max_length:
                raise ConfigError(
                    f"prompt {i} is too long: {len(prompt)} tokens and {max_new_tokens} new ones"
                    f" are {size}, more than {self._max_length}"
                )

    # Shapes.

    def _rows(self, count: int) -> int:
        """Rows of the batch: a power of two on each device."""
        shards = math.prod(self._layout.mesh.shape[axis] for axis in ("data", "fsdp"))
        return shards * (1 << (-(-count // shards) - 1).bit_length())

    def _chunks(self, rows: int, longest: int) -> tuple[int, int]:
        """Tokens of a chunk, and how many chunks."""
        size = _bucket(longest)
        if self._layout.mesh_axis("sequence"):
            return size, 1
        shards = math.prod(self._layout.mesh.shape[axis] for axis in ("data", "fsdp"))
        most = self._chunk or max(_SMALLEST, _PREFILL_TOKENS * shards // rows)
        chunk = min(size, most)
        return chunk, -(-longest // chunk)

    # On the devices.

    def _read_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> _State:
        """The state after the first new token of each row."""
        rows = self._rows(len(prompts))
        lengths = np.ones(rows, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        chunk, count = self._chunks(rows, int(lengths.max()))
        size = max(chunk * count, int(lengths.max()) + max_new_tokens)
        tokens = np.zeros((rows, chunk * count), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        positions = np.broadcast_to(np.arange(chunk * count, dtype=np.int32), tokens.shape)
        stripes = self._layout.stripes(chunk)
        order = np.argsort(stripes.permutation())

        cache = self._empty(rows, _bucket(size))
        hidden = np.zeros((rows, self._config.embed_dim), jnp.dtype(self._config.compute_dtype))
        for start in range(0, chunk * count, chunk):
            part = slice(start, start + chunk)
            batch = stripes.apply({"tokens": tokens[:, part], "positions": positions[:, part]})
            last = lengths - 1 - start
            here = (last >= 0) & (last < chunk)
            # Where the last token of each row stands in the chunk.
            place = np.where(here, order[np.clip(last, 0, chunk - 1)], -1).astype(np.int32)
            hidden, cache = self._prefill(
                self._params, cache, hidden, batch, place, np.int32(start) if start else None
            )
        return self._first(self._params, cache, hidden, lengths, _identities(prompts, rows))

    def _prefill_chunk(self, params: DecoderParams, cache, hidden, batch, place, start):
        x, cache = self._decoder.prefill(params, cache, batch["tokens"], batch["positions"], start)
        at = jnp.maximum(place, 0)[:, None, None]
        last = jnp.take_along_axis(x, at, 1)[:, 0]
        hidden = jnp.where(place[:, None] >= 0, last, hidden)
        return self._layout.constrain(hidden, "batch", None), cache

    def _first_token(self, params: DecoderParams, cache, hidden, lengths, identities) -> _State:
        key = jax.random.key(self._sampling.seed)
        fold = jax.vmap(jax.random.fold_in)
        keys = fold(fold(jnp.broadcast_to(key, lengths.shape), identities[:, 0]), identities[:, 1])
        tokens = self._choose(params, hidden, keys, lengths)
        return _State(cache, lengths, tokens, jnp.zeros(lengths.shape, bool), keys)

    def _run_steps(self, params: DecoderParams, state: _State, done, count):
        """Up to `count` tokens of each row that is not done: the state, and tokens `[B,BLOCK]`."""
        ends = jnp.asarray(sorted(self._end_ids), jnp.int32)

        def step(carry):
            i, state, made = carry
            hidden, cache = self._decoder.step(params, state.cache, state.tokens, state.lengths)
            lengths = state.lengths + ~state.done
            tokens = self._choose(params, hidden, state.keys, lengths)
            tokens = jnp.where(state.done, state.tokens, tokens)
            done = state.done | (tokens[:, None] == ends).any(1)
            made = jax.lax.dynamic_update_index_in_dim(made, tokens, i, 1)
            return i + 1, _State(cache, lengths, tokens, done, state.keys), made

        state = dataclasses.replace(state, done=done)
        made = jnp.zeros((done.shape[0], BLOCK), jnp.int32)
        _, state, made = jax.lax.while_loop(
            lambda carry: (carry[0] < count) & ~carry[1].done.all(), step, (0, state, made)
        )
        return state, self._layout.constrain(made)

    def _choose(self, params: DecoderParams, hidden, keys, lengths) -> jax.Array:
        """The token after so many of each row; the same on every device."""
        keys = jax.vmap(jax.random.fold_in)(keys, lengths)
        return self._layout.constrain(
            self._sampling.choose(self._decoder.logits(params, hidden), keys)
        )


def _check_token(where: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ConfigError(f"{where} has token {token}, but the vocabulary has {vocab_size}")


def _bucket(n: int) -> int:
    """At least `n`, at most a quarter more (or 64): four sizes between powers of two."""
    return round_up(n, max(_SMALLEST, 1 << max(0, n.bit_length() - 3)))


def _identities(prompts: Sequence[Sequence[int]], rows: int) -> np.ndarray:
    """uint32 `[B,2]`: a checksum of each prompt, and how many equal ones come before."""
    seen: collections.Counter[int] = collections.Counter()
    identities = np.zeros((rows, 2), np.uint32)
    for identity, prompt in zip(identities, prompts):
        checksum = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        identity[:] = checksum, seen[checksum]
        seen[checksum] += 1
    return identities
