"""RULER's two question answering tasks: gold documents among others.

The rules and template are NVIDIA's (see `ruler_niah`). The questions are SQuAD 2.0's
answerable ones (qa_1) and HotpotQA's in the distractor setting (qa_2), development sets,
from a file that the user brings; else questions about invented people.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.scores import string_match_part
from lucid_jax.evaluate.tasks.prose import biographies, people
from lucid_jax.evaluate.tasks.task import Budget, Sample, Task
from lucid_jax.evaluate.tasks.texts import PROSE, Sources

_RULE = (
    "Answer the question based on the given documents. Only give me the answer and do not"
    " output any other words."
)
_TEMPLATE = (
    f"{_RULE}\n\nThe following are given documents.\n\n{{context}}\n\n{_RULE}"
    "\n\nQuestion: {query} Answer:"
)
_NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answers, and which documents hold them; `related` come next."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


Questions = tuple[tuple[Question, ...], tuple[str, ...]]


class DocumentQuestions(Task):
    """Answer a question of which some of many documents know the answer.

    Sample `index` asks question `index`; the seed draws the other documents.
    """

    metric = "string_match_part"

    def __init__(self, name: str, sources: Sources):
        hops, parse, self.source = {
            "qa_1": (1, _parse_squad, "squad"),
            "qa_2": (2, _parse_hotpotqa, "hotpotqa"),
        }[name]
        path = getattr(sources, self.source)
        self._questions, self._documents = _read(path, parse) if path else _invent(hops)
        self.name = f"ruler_{name}{'' if path else PROSE}"
        self.size = len(self._questions)

    def _sample(self, budget: Budget, key: tuple[int, int]) -> Sample:
        question = self._questions[key[1]]
        rng = budget.generator(key)
        order = self._order(question, rng)

        def render(size: int) -> str:
            # Beyond the last document they begin again.
            repeats = -(-size // len(order))
            shown = (order * repeats)[:size]
            shuffled = budget.generator(key, "layout").permutation(len(shown))
            documents = [self._documents[shown[i]] for i in shuffled]
            context = "\n\n".join(f"Document {i}:\n{d}" for i, d in enumerate(documents, 1))
            return _TEMPLATE.format(context=context, query=question.query)

        prompt, tokens = budget.fit(render, _NEW_TOKENS, len(question.gold), budget.length)
        return Sample(prompt, question.answers, _NEW_TOKENS, meta={"prompt_tokens": tokens})

    def _order(self, question: Question, rng: np.random.Generator) -> list[int]:
        """Numbers of all documents: gold, then related, then the others, as they are drawn."""
        related = [question.related[i] for i in rng.permutation(len(question.related))]
        first = [*question.gold, *related]
        known = set(first)
        others = [i for i in rng.permutation(len(self._documents)).tolist() if i not in known]
        return first + others

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """See `Task`."""
        return {self.metric: string_match_part(prediction, sample.answers)}


@functools.lru_cache(maxsize=2)
def _read(path: str, parse: Callable[[Any], Questions]) -> Questions:
    try:
        return parse(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        benchmark = "SQuAD 2.0" if parse is _parse_squad else "HotpotQA"
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot read {benchmark}'s JSON from {path!r}: {reason}") from error


def _parse_squad(data: Any) -> Questions:
    articles = [[p["context"] for p in article["paragraphs"]] for article in data["data"]]
    documents = tuple(sorted({text for article in articles for text in article}))
    number = {text: i for i, text in enumerate(documents)}
    questions = tuple(
        Question(
            query=qa["question"],
            answers=tuple(answer["text"] for answer in qa["answers"]),
            gold=(number[paragraph["context"]],),
            related=tuple(sorted({number[t] for t in texts} - {number[paragraph["context"]]})),
        )
        for article, texts in zip(data["data"], articles)
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
        if not qa["is_impossible"]
    )
    return questions, documents


def _parse_hotpotqa(data: Any) -> Questions:
    contexts = [[f"{title}\n{''.join(lines)}" for title, lines in q["context"]] for q in data]
    documents = tuple(sorted({text for context in contexts for text in context}))
    number = {text: i for i, text in enumerate(documents)}
    questions = tuple(
        Question(q["question"], (q["answer"],), tuple(number[text] for text in context))
        for q, context in zip(data, contexts)
    )
    return questions, documents


def _invent(hops: int) -> Questions:
    """Questions about where people, or with two hops their teachers, were born."""
    if hops == 1:
        questions = [
            Question(f"In which town was {p.name} born?", (p.town,), (i,))
            for i, p in enumerate(people())
        ]
    else:
        questions = [
            Question(
                f"In which town was the person born from whom {p.name} learned the trade?",
                (people()[p.teacher].town,),
                (i, p.teacher),
            )
            for i, p in enumerate(people())
        ]
    return tuple(questions), biographies()
