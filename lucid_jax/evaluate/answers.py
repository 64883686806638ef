"""What a model writes after prompts: texts in batches, each up to its own end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lucid_jax.config import Config
from lucid_jax.data.tokenizer import Tokenizer
from lucid_jax.inference.generator import Generator
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import Layout


@dataclasses.dataclass(frozen=True)
class Question:
    """The tokens of a prompt, and where the answer ends if the model does not end it."""

    prompt: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


class Answers:
    """Answers questions greedily with one model."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, params: Any):
        """Copies the parameters, which are not needed afterwards."""
        self._tokenizer = tokenizer
        ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._generator = Generator(model, params, end_ids=ends)

    def __call__(self, questions: Sequence[Question], rows: int) -> list[str]:
        """The answers to at most `rows` questions, at least one, in one batch of `rows`."""
        # Always as many rows: another number would be compiled anew.
        prompts = [question.prompt for question in questions]
        prompts += [prompts[0][:1]] * (rows - len(prompts))

        def finished(row: int, ids: list[int]) -> bool:
            return row >= len(questions) or self._is_finished(questions[row], ids)

        most = max(question.max_new_tokens for question in questions)
        completions = self._generator(prompts, most, finished)
        return [
            _cut(self._tokenizer.decode(ids[: question.max_new_tokens]), question.stop)
            for ids, question in zip(completions, questions)
        ]

    def _is_finished(self, question: Question, ids: list[int]) -> bool:
        if len(ids) >= question.max_new_tokens:
            return True
        # Decoding takes long for what may be asked often.
        text = self._tokenizer.decode(ids) if question.stop else ""
        return any(stop in text for stop in question.stop)


def rows_of_batch(config: Config, layout: Layout, length: int, wanted: int) -> int:
    """How many rows of `length` tokens have at most as many as a micro-batch of training.

    A power of two for each of the devices that rows are split over, as decoding takes them, at
    least one, and no more than `wanted` rows take.
    """
    tokens = config.batch_size // config.accumulation * config.data.sequence_length
    devices = layout.mesh.shape["data"] * layout.mesh.shape["fsdp"]
    fits = 1 << max((tokens // (length * devices)).bit_length() - 1, 0)
    asked = 1 << (-(-wanted // devices) - 1).bit_length()
    return min(fits, asked) * devices


def _cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the first of `stops`."""
    return text[: min((i for stop in stops if (i := text.find(stop)) >= 0), default=len(text))]
