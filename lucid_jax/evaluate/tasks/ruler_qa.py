"""RULER's two question answering tasks: the documents with the answer, among others.

The rules and template are NVIDIA's (see `ruler_niah`). The questions are the answerable ones of
SQuAD 2.0 (qa_1) and those of HotpotQA's distractor setting (qa_2), both from the development
sets, read from a file of the user. Without a file they are about invented people.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.tasks.prose import biographies, people
from lucid_jax.evaluate.tasks.ruler import RulerTask
from lucid_jax.evaluate.tasks.task import Sample, SampleBuilder
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
    """A question, its answers, and the indices of the documents that hold them.

    The `related` documents are shown before others.
    """

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


# Questions, and all documents.
Dataset = tuple[tuple[Question, ...], tuple[str, ...]]


class DocumentQuestions(RulerTask):
    """Answer a question from a few documents among many.

    Sample `index` is about question `index`; the seed draws the other documents.
    """

    metric = "string_match_part"

    def __init__(self, name: str, sources: Sources):
        self.source, parse, hops = {
            "qa_1": ("squad", _parse_squad, 1),
            "qa_2": ("hotpotqa", _parse_hotpotqa, 2),
        }[name]
        path = getattr(sources, self.source)
        self._questions, self._documents = _read(path, parse) if path else _invent(hops)
        self.name = f"ruler_{name}{'' if path else PROSE}"
        self.size = len(self._questions)

    def _build(self, builder: SampleBuilder) -> Sample:
        question = self._questions[builder.index]
        order = self._order(question, builder.generator())

        def render(size: int) -> str:
            # Documents are repeated if there are fewer than `size`.
            repeats = -(-size // len(order))
            shown = (order * repeats)[:size]
            shuffled = builder.generator("layout").permutation(len(shown))
            documents = [self._documents[shown[i]] for i in shuffled]
            context = "\n\n".join(f"Document {i}:\n{d}" for i, d in enumerate(documents, 1))
            return _TEMPLATE.format(context=context, query=question.query)

        return builder.fit(
            render, question.answers, _NEW_TOKENS, len(question.gold), builder.length
        )

    def _order(self, question: Question, rng: np.random.Generator) -> list[int]:
        """Orders all documents: gold, then related, then others, the latter two shuffled."""
        related = [question.related[i] for i in rng.permutation(len(question.related))]
        first = [*question.gold, *related]
        known = set(first)
        others = rng.permutation(len(self._documents)).tolist()
        return first + [i for i in others if i not in known]


@functools.lru_cache(maxsize=2)
def _read(path: str, parse: Callable[[Any], Dataset]) -> Dataset:
    try:
        return parse(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        benchmark = "SQuAD 2.0" if parse is _parse_squad else "HotpotQA"
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot read {benchmark}'s JSON from {path!r}: {reason}") from error


def _parse_squad(data: Any) -> Dataset:
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


def _parse_hotpotqa(data: Any) -> Dataset:
    contexts = [[f"{title}\n{''.join(lines)}" for title, lines in q["context"]] for q in data]
    documents = tuple(sorted({text for context in contexts for text in context}))
    number = {text: i for i, text in enumerate(documents)}
    questions = tuple(
        Question(q["question"], (q["answer"],), tuple(number[text] for text in context))
        for q, context in zip(data, contexts)
    )
    return questions, documents


def _invent(hops: int) -> Dataset:
    """Asks where invented people (one hop) or their teachers (two hops) were born."""
    questions = []
    for i, person in enumerate(people()):
        if hops == 1:
            query = f"In which town was {person.name} born?"
            questions.append(Question(query, (person.town,), (i,)))
        else:
            query = f"In which town was the person born from whom {person.name} learned the trade?"
            town = people()[person.teacher].town
            questions.append(Question(query, (town,), (i, person.teacher)))
    return tuple(questions), biographies()
