"""Runs lm-eval's tasks on a checkpoint.

    python -m lucid_jax.evaluate.harness run --model lucid \\
        --model_args checkpoint=runs/lucid_1b --batch_size auto --tasks hellaswag

This is lm-eval's own command line, with the model `lucid` registered. It needs
`pip install -e '.[lm-eval]'`. With several processes each runs all requests, because together
they hold one model.
"""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import tqdm
from absl import logging
from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from lucid_jax.checkpoint.reader import CheckpointError
from lucid_jax.checkpoint.restore import restore_params, saved_config
from lucid_jax.config import Config, ConfigError
from lucid_jax.data import check_vocabulary, load_tokenizer
from lucid_jax.data.tokenizer import encode_prompt
from lucid_jax.evaluate.batching import batches_by_length, fit_devices
from lucid_jax.evaluate.likelihood import Continuation, Likelihood
from lucid_jax.evaluate.text_generator import GenerationRequest, TextGenerator
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout


@register_model("lucid")
class LucidLM(TemplateLM):
    """A checkpoint as a model of lm-eval, with the configuration that it was saved with."""

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Restores the parameters, sharded over all devices.

        Args:
          checkpoint: A work directory or the directory of a step, as in `restore_params`.
          batch_size: Sequences of `max_length` tokens to run at a time, rounded up to a multiple
            of the devices; more of shorter requests are run. "auto" takes the micro-batch of
            training.
          max_length: The most tokens of a request; by default the sequence length of training.
          max_batch_size: Ignored, as is `device`; lm-eval passes both to every model.
        """
        super().__init__()
        config = _adapt_config(Config.from_dict(saved_config(checkpoint)), batch_size, max_length)
        # Not `tokenizer`, which lm-eval expects to be one of the library transformers.
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        check_vocabulary(config, self._tokenizer)
        self._config, self._layout = config, make_layout(config)
        self._model = LanguageModel.build(config.model, self._layout)
        _, self._params, _ = restore_params(checkpoint, self._model.abstract_params)
        self._likelihood = Likelihood(config, self._model, self._params)

    @functools.cached_property
    def _generator(self) -> TextGenerator:
        # Built on first use, because it copies the parameters.
        return TextGenerator(self._model, self._tokenizer, self._params)

    @property
    def max_length(self) -> int:
        """The most tokens of a request."""
        return self._config.data.sequence_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, or else the one that begins it."""
        return self._special_token(self._tokenizer.eos_id, self._tokenizer.bos_id)

    @property
    def prefix_token_id(self) -> int:
        """The context of a text's first token: the token that begins or else ends a document."""
        return self._special_token(self._tokenizer.bos_id, self._tokenizer.eos_id)

    def _special_token(self, *ids: int | None) -> int:
        for token in ids:
            if token is not None:
                return token
        raise ConfigError(
            f"data.tokenizer={self._config.data.tokenizer!r} has no token that begins or ends a"
            " document, which this request needs"
        )

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's path, which is part of the key of lm-eval's request cache."""
        return self._config.data.tokenizer

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text, with the BOS token unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self._tokenizer.encode(string).tolist()
        return encode_prompt(self._tokenizer, string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """See `TemplateLM`; a context that is too long loses its beginning."""
        continuations, truncated = [], 0
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens is longer than"
                    f" max_length={self.max_length}"
                )
            # A context of spaces is empty, because lm-eval moves them to the continuation.
            context = context or [self.prefix_token_id]
            tokens = (context + continuation)[-(self.max_length + 1) :]
            truncated += len(tokens) < len(context) + len(continuation)
            continuations.append(Continuation(tokens, len(continuation)))
        self._warn_of_truncation(truncated)
        with _progress_bar("log-likelihoods", len(requests), disable_tqdm) as bar:
            return self._likelihood(continuations, bar.update)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See `LM`."""
        windows = [self._rolling_windows(*request.args) for request in requests]
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*windows)), disable_tqdm))
        return [sum((next(scores)[0] for _ in group), 0.0) for group in windows]

    def _rolling_windows(self, text: str) -> list[tuple[None, list[int], list[int]]]:
        """Splits a text into (None, context, continuation) that cover each token once."""
        windows = utils.get_rolling_token_windows(
            self.tok_encode(text, add_special_tokens=False),
            self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *utils.make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM`; decodes greedily, and a prompt that is too long loses its beginning."""
        generations, truncated = [], 0
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options)
            room = self._room_for_prompt(options)
            tokens = self.tok_encode(context)
            truncated += len(tokens) > room
            stop = tuple(text for text in options["until"] if text)
            generations.append(GenerationRequest(tokens[-room:], options["max_gen_toks"], stop))
        self._warn_of_truncation(truncated)
        new_tokens = [generation.max_new_tokens for generation in generations]
        lengths = [len(generation.prompt) + n for generation, n in zip(generations, new_tokens)]
        texts: dict[int, str] = {}
        with _progress_bar("generation", len(requests), disable_tqdm) as bar:
            batches = batches_by_length(self._config, self._layout, lengths, new_tokens)
            for _, batch_size, indices in batches:
                completions = self._generator([generations[i] for i in indices], batch_size)
                texts.update(zip(indices, completions))
                bar.update(len(indices))
        return [texts[i] for i in range(len(requests))]

    def _room_for_prompt(self, options: dict[str, Any]) -> int:
        """Checks generation options and returns the most tokens of a prompt."""
        if options["do_sample"] and options.get("temperature") != 0:
            raise ConfigError(f"LucidLM generates greedily; got {options}")
        room = self.max_length - options["max_gen_toks"]
        if room <= 0:
            raise ConfigError(
                f"max_gen_toks={options['max_gen_toks']} leaves no token of"
                f" max_length={self.max_length} for the prompt"
            )
        return room

    def _warn_of_truncation(self, count: int) -> None:
        if count:
            logging.warning(
                "%d requests are longer than max_length=%d and lost their beginning",
                count, self.max_length,
            )  # fmt: skip


def _progress_bar(description: str, total: int, disable: bool) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, desc=description, disable=disable or jax.process_index() > 0)


def _adapt_config(config: Config, batch_size: int | str, max_length: int | None) -> Config:
    """Returns the configuration for the devices of this run, a batch size and a length."""
    sequences = config.batch_size // config.accumulation
    if batch_size != "auto":
        if not str(batch_size).isdecimal() or int(batch_size) == 0:
            raise ConfigError(f"batch_size must be auto or a positive integer; got {batch_size!r}")
        sequences = int(batch_size)
    if max_length is not None:
        data = dataclasses.replace(config.data, sequence_length=int(max_length))
        config = dataclasses.replace(config, data=data)
    return fit_devices(config, sequences)


def main() -> None:
    """Runs lm-eval's command line."""
    try:
        cli_evaluate()
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
