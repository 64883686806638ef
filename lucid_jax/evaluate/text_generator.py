"""Generates text from prompts in batches, each completion up to its own end."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from lucid_jax.data.text_stream import TextStream
from lucid_jax.data.tokenizer import Tokenizer
from lucid_jax.inference.generator import Generator
from lucid_jax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A prompt and the limits of its completion.

    Attributes:
      prompt: Token ids.
      stop: Texts, or special tokens as they are written, that end the completion and are not
        part of it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


class TextGenerator:
    """Generates text greedily with one model."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, params: Any):
        """Copies the parameters, which are not needed afterwards."""
        self._tokenizer = tokenizer
        self._generator = Generator(model, params, end_ids=tokenizer.special.ends)

    def __call__(self, requests: Sequence[GenerationRequest], batch_size: int) -> list[str]:
        """Completes 1 to `batch_size` requests as one batch of `batch_size` sequences."""
        # A short batch is padded, because every other size would be compiled anew.
        prompts = [request.prompt for request in requests]
        prompts += [prompts[0][:1]] * (batch_size - len(prompts))

        def finished(i: int, ids: list[int]) -> bool:
            return i >= len(requests) or self._is_finished(requests[i], ids)

        max_new_tokens = max(request.max_new_tokens for request in requests)
        completions = self._generator(prompts, max_new_tokens, finished)
        return [self._text(request, ids) for ids, request in zip(completions, requests)]

    def _is_finished(self, request: GenerationRequest, ids: list[int]) -> bool:
        if len(ids) >= request.max_new_tokens or not self._stop_ids(request).isdisjoint(ids):
            return True
        # This is called for every token, and decoding is slow.
        text = self._tokenizer.decode(ids) if request.stop else ""
        return any(stop in text for stop in request.stop)

    def _text(self, request: GenerationRequest, ids: list[int]) -> str:
        """Returns the text behind the prompt, with its first space."""
        stops = self._stop_ids(request)
        ids = list(itertools.takewhile(lambda i: i not in stops, ids[: request.max_new_tokens]))
        stream = TextStream(self._tokenizer, request.prompt)
        return _cut(stream.push(ids) + stream.close(), request.stop)

    def _stop_ids(self, request: GenerationRequest) -> set[int | None]:
        return {self._tokenizer.special_id(stop) for stop in request.stop} - {None}


def _cut(text: str, stops: Sequence[str]) -> str:
    """Returns `text` up to the first occurrence of any of `stops`."""
    return text[: min((i for stop in stops if (i := text.find(stop)) >= 0), default=len(text))]
