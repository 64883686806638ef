"""Batched generation: completes prompts of any lengths with a few compiled shapes."""

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
from lucid_jax.inference.kv_cache import KVCache
from lucid_jax.inference.sampling import Sampling
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.ops.numerics import ceil_div, round_up

# Decode steps of one call of the device; between calls the host looks for finished completions.
STEPS_PER_CALL = 16
# Prompt tokens that a device prefills at a time, which bounds the memory of activations.
_PREFILL_TOKENS = 65_536
# Lengths are rounded up to this at least, and prefill chunks are not shorter by default.
_MIN_LENGTH = 64

_GREEDY = Sampling()

Finished = Callable[[int, list[int]], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The state between two decode steps.

    Attributes:
      cache: The cache of all tokens but the last of each sequence.
      lengths: int32 `[B]`, the number of cached tokens.
      tokens: int32 `[B]`, the last token of each sequence.
      done: bool `[B]`, the sequences that no longer change.
      keys: Random keys `[B]`.
    """

    cache: KVCache
    lengths: jax.Array
    tokens: jax.Array
    done: jax.Array
    keys: jax.Array


class Generator:
    """Completes prompts with one model; compiled functions are kept between calls."""

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
          model: The model's structure. Sequences are split over the mesh axes `data` and `fsdp`,
            heads over `tensor`, and the tokens of the cache over `context`.
          params: The parameters, as in training; not needed afterwards.
          end_ids: Tokens that end a completion.
          max_length: The most tokens of a prompt and its completion together; None is no limit.
          chunk: Prompt tokens of a prefill chunk; None takes as many as fit in memory. With
            context parallelism or PaTH a chunk is always the whole prompt.

        Raises:
          ConfigError: an end token that is not in the vocabulary, a chunk below 1, or a PaTH model
            whose mesh has `context`.
        """
        for token in end_ids:
            _check_token("an end", token, model.config.vocab_size)
        if chunk is not None and chunk < 1:
            raise ConfigError(f"chunk must be positive; got {chunk}")
        context = model.layout.mesh.shape["context"]
        if model.config.positions == "path" and context > 1:
            raise ConfigError(
                "a model of model.positions='path' decodes whole sequences: expected"
                f" mesh.context = 1; got {context}"
            )
        self._config, self._layout, self._sampling = model.config, model.layout, sampling
        self._batch_shards = math.prod(model.layout.mesh.shape[axis] for axis in ("data", "fsdp"))
        self._max_length, self._chunk = max_length, chunk
        self._end_ids = frozenset(end_ids)
        self._decoder = Decoder(model)
        self._params = jax.jit(self._decoder.prepare)(params)
        self._init_cache = jax.jit(self._decoder.attention.init_cache, static_argnums=(0, 1))
        self._prefill = jax.jit(self._prefill_chunk, donate_argnums=1)
        self._first = jax.jit(self._first_token, donate_argnums=1)
        self._steps = jax.jit(self._run_steps, donate_argnums=1)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        finished: Finished | None = None,
    ) -> list[list[int]]:
        """Completes all prompts as one batch.

        A sample depends on the seed, its prompt, and the number of equal prompts before it, but
        not on the other prompts.

        Args:
          prompts: Token ids of each prompt, at least one.
          finished: Called every few tokens with the index of a prompt and its completion so far;
            returns whether to end it there.

        Returns:
          The completions in the order of the prompts, without prompts and end tokens.

        Raises:
          ConfigError: a prompt that is empty, has a token outside the vocabulary, or is too long
            for `max_length`.
        """
        self._check(prompts, max_new_tokens)
        if len(prompts) == 0:
            return []
        completions: list[list[int]] = [[] for _ in prompts]
        state = self._read_prompts(prompts, max_new_tokens)
        # Sequences that only pad the batch are done from the start.
        done = np.arange(state.done.shape[0]) >= len(prompts)
        tokens = jax.device_get(state.tokens)[:, None]
        generated = 1
        while True:
            for i, completion in enumerate(completions):
                if not done[i]:
                    done[i] = self._extend(completion, tokens[i], finished, i)
            remaining = max_new_tokens - generated
            if remaining == 0 or done.all():
                return completions
            count = min(remaining, STEPS_PER_CALL)
            state, tokens = self._steps(self._params, state, done, np.int32(count))
            tokens = jax.device_get(tokens)[:, :count]
            generated += count

    def _extend(
        self, completion: list[int], tokens: np.ndarray, finished: Finished | None, i: int
    ) -> bool:
        """Appends new tokens up to an end token; returns whether the completion is done."""
        for token in tokens.tolist():
            if token in self._end_ids:
                return True
            completion.append(token)
        return finished is not None and finished(i, completion)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not isinstance(max_new_tokens, int | np.integer):
            raise ConfigError(f"max_new_tokens must be an integer; got {max_new_tokens!r}")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be positive; got {max_new_tokens}")
        for i, prompt in enumerate(prompts):
            if np.ndim(prompt) != 1:
                kind = type(prompt).__name__
                raise ConfigError(f"prompt {i} must be a sequence of token ids; got {kind}")
            if len(prompt) == 0:
                raise ConfigError(f"prompt {i} is empty; expected at least one token")
            if not np.issubdtype(np.asarray(prompt).dtype, np.integer):
                raise ConfigError(f"prompt {i} must hold integers; got {np.asarray(prompt).dtype}")
            for token in (min(prompt), max(prompt)):
                _check_token(f"prompt {i}", token, self._config.vocab_size)
            size = len(prompt) + max_new_tokens
            if self._max_length is not None and size > self._max_length:
                raise ConfigError(
                    f"prompt {i} is too long: {len(prompt)} tokens and {max_new_tokens} new ones"
                    f" are {size}, more than {self._max_length}"
                )

    def _chunks(self, batch: int, longest: int) -> tuple[int, int]:
        """Returns the tokens of a prefill chunk, and the number of chunks."""
        size = _bucket(longest)
        if self._layout.mesh_axis("sequence") or self._config.positions == "path":
            return size, 1
        fits = max(_MIN_LENGTH, _PREFILL_TOKENS * self._batch_shards // batch)
        chunk = min(size, self._chunk or fits)
        return chunk, ceil_div(longest, chunk)

    def _read_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> _State:
        """Prefills the prompts and samples the first token of each completion."""
        batch = padded_batch(len(prompts), self._batch_shards)
        lengths = np.ones(batch, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        chunk, count = self._chunks(batch, int(lengths.max()))
        size = max(chunk * count, int(lengths.max()) + max_new_tokens)
        tokens = np.zeros((batch, chunk * count), np.int32)
        for padded, prompt in zip(tokens, prompts):
            padded[: len(prompt)] = prompt
        positions = np.broadcast_to(np.arange(chunk * count, dtype=np.int32), tokens.shape)
        stripes = self._layout.stripes(chunk)
        order = np.argsort(stripes.permutation())

        cache = self._init_cache(batch, _bucket(size))
        hidden = np.zeros((batch, self._config.embed_dim), jnp.dtype(self._config.compute_dtype))
        for start in range(0, chunk * count, chunk):
            part = slice(start, start + chunk)
            inputs = stripes.apply({"tokens": tokens[:, part], "positions": positions[:, part]})
            last = lengths - 1 - start
            in_chunk = (last >= 0) & (last < chunk)
            # The index of each prompt's last token in the chunk; -1 if it is in another chunk.
            index = np.where(in_chunk, order[np.clip(last, 0, chunk - 1)], -1).astype(np.int32)
            at = np.int32(start) if start else None
            hidden, cache = self._prefill(self._params, cache, hidden, inputs, index, lengths, at)
        return self._first(self._params, cache, hidden, lengths, _identities(prompts, batch))

    # Compiled functions.

    def _prefill_chunk(self, params: DecoderParams, cache, hidden, inputs, index, lengths, start):
        """Reads a chunk; `hidden [B,E]` collects the states of the prompts' last tokens."""
        x, cache = self._decoder.prefill(
            params, cache, inputs["tokens"], inputs["positions"], lengths, start
        )
        last = jnp.take_along_axis(x, jnp.maximum(index, 0)[:, None, None], 1)[:, 0]
        hidden = jnp.where(index[:, None] >= 0, last, hidden)
        return self._layout.constrain(hidden, "batch", None), cache

    def _first_token(self, params: DecoderParams, cache, hidden, lengths, identities) -> _State:
        key = jax.random.key(self._sampling.seed)
        fold = jax.vmap(jax.random.fold_in)
        keys = fold(fold(jnp.broadcast_to(key, lengths.shape), identities[:, 0]), identities[:, 1])
        tokens = self._choose(params, hidden, keys, lengths)
        return _State(cache, lengths, tokens, jnp.zeros(lengths.shape, bool), keys)

    def _run_steps(self, params: DecoderParams, state: _State, done, count):
        """Decodes up to `count` tokens of each sequence that is not done.

        Returns the state and the new tokens `[B,STEPS_PER_CALL]`.
        """
        ends = jnp.asarray(sorted(self._end_ids), jnp.int32)

        def step(carry):
            i, state, new_tokens = carry
            hidden, cache = self._decoder.step(params, state.cache, state.tokens, state.lengths)
            lengths = state.lengths + ~state.done
            tokens = self._choose(params, hidden, state.keys, lengths)
            tokens = jnp.where(state.done, state.tokens, tokens)
            done = state.done | (tokens[:, None] == ends).any(1)
            new_tokens = jax.lax.dynamic_update_index_in_dim(new_tokens, tokens, i, 1)
            return i + 1, _State(cache, lengths, tokens, done, state.keys), new_tokens

        state = dataclasses.replace(state, done=done)
        new_tokens = jnp.zeros((done.shape[0], STEPS_PER_CALL), jnp.int32)
        _, state, new_tokens = jax.lax.while_loop(
            lambda carry: (carry[0] < count) & ~carry[1].done.all(), step, (0, state, new_tokens)
        )
        return state, self._layout.constrain(new_tokens)

    def _choose(self, params: DecoderParams, hidden, keys, lengths) -> jax.Array:
        """Chooses the token that follows `lengths` tokens; every device gets all of them."""
        keys = jax.vmap(jax.random.fold_in)(keys, lengths)
        return self._layout.constrain(
            self._sampling.choose(self._decoder.logits(params, hidden), keys)
        )


def padded_batch(count: int, shards: int) -> int:
    """Returns the size of a batch of `count` sequences: a power of two on each of the shards."""
    return shards * (1 << (ceil_div(count, shards) - 1).bit_length())


def _check_token(where: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ConfigError(f"{where} has token {token}, but the vocabulary has {vocab_size}")


def _bucket(n: int) -> int:
    """Rounds a length up, by at most a quarter (or to 64): four sizes between powers of two."""
    return round_up(n, max(_MIN_LENGTH, 1 << max(0, n.bit_length() - 3)))


def _identities(prompts: Sequence[Sequence[int]], batch: int) -> np.ndarray:
    """Returns uint32 `[B,2]`: each prompt's checksum, and the number of equal prompts before it."""
    seen: collections.Counter[int] = collections.Counter()
    identities = np.zeros((batch, 2), np.uint32)
    for identity, prompt in zip(identities, prompts):
        checksum = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        identity[:] = checksum, seen[checksum]
        seen[checksum] += 1
    return identities
