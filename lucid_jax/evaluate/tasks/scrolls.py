"""SCROLLS' seven tasks: the validation rows, read from a folder of the user.

Shaham et al., "SCROLLS: Standardized CompaRison Over Long Language Sequences", arXiv
2201.03533. Prompts and stop texts are those of lm-eval 0.4.13, which also cuts the beginning of a
prompt that is too long. All answers are generated, whereas lm-eval compares likelihoods in
multiple-choice questions (quality, contract_nli, yes or no in qasper), so scores on those differ
from lm-eval's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lucid_jax.evaluate.scores import best, exact_match, rouge, token_f1
from lucid_jax.evaluate.tasks.snapshot import Row, column, read_rows
from lucid_jax.evaluate.tasks.task import Sample, SampleBuilder, Task
from lucid_jax.evaluate.tasks.texts import Sources

_QUESTION = "{text}\n\nQuestion: {question}\nAnswer:"
_SUMMARY = "{text}\n\nQuestion: What is a summary of the preceding text?\nAnswer:"
_NEW_TOKENS = 256
_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True)
class _Spec:
    template: str
    metric: str
    max_new_tokens: int = _NEW_TOKENS


SPECS = {
    "qasper": _Spec(_QUESTION, "f1"),
    "narrative_qa": _Spec(_QUESTION, "f1"),
    "qmsum": _Spec(_QUESTION, "rouge"),
    # Summaries of reports have about 600 words.
    "gov_report": _Spec(_SUMMARY, "rouge", 1024),
    "summ_screen_fd": _Spec(_SUMMARY, "rouge"),
    # The question lists the choices, one of which is to be generated.
    "quality": _Spec(_QUESTION, "exact_match"),
    "contract_nli": _Spec("{text}\n\nHypothesis: {question}\nConclusion:", "exact_match"),
}


class Scrolls(Task):
    """Sample `index` is row `index` of the task's files, whatever the seed.

    Rows with the same id are one row with several answers.
    """

    source = "scrolls"

    def __init__(self, name: str, sources: Sources):
        self._task = name
        self._spec = SPECS[name]
        self._rows = _merge(read_rows(self.source, name, "validation", sources.scrolls))
        self.name = f"scrolls_{name}"
        self.metric = self._spec.metric
        self.size = len(self._rows)

    def _build(self, builder: SampleBuilder) -> Sample:
        text, answers = self._rows[builder.index]
        question = ""
        if self._spec.template is not _SUMMARY:
            question, text = _split(text, choices=self._task == "quality")
        prompt = self._spec.template.format(text=text, question=question)
        return builder.truncate(prompt, answers, self._spec.max_new_tokens, head=0.0, stop=("\n",))

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """See `Task`: the best of each score against any of the answers."""
        if self.metric == "rouge":
            rouges = [rouge(prediction, answer) for answer in sample.answers]
            return {name: max(values[name] for values in rouges) for name in _ROUGE}
        if self._task == "qasper" and not prediction.strip():
            prediction = "Unanswerable"
        score = token_f1 if self.metric == "f1" else exact_match
        return {self.metric: best(score, prediction, sample.answers)}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """See `Task`: `rouge` is the geometric mean of the three means."""
        means = super().aggregate(scores)
        if self.metric == "rouge":
            means["rouge"] = (means["rouge1"] * means["rouge2"] * means["rougeL"]) ** (1 / 3)
        return means


def _merge(rows: Sequence[Row]) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the text and all answers of each id, in the order of the ids' first rows."""
    merged: dict[Any, tuple[str, tuple[str, ...]]] = {}
    for row in rows:
        text, answers = merged.get(column(row, "id"), (column(row, "input"), ()))
        merged[row["id"]] = text, (*answers, column(row, "output"))
    return list(merged.values())


def _split(text: str, choices: bool) -> tuple[str, str]:
    """Splits a row into the question, which comes first, and the text.

    A blank line ends the question; with `choices` it is the first one after "(D)".
    """
    end = text.find("\n\n", max(text.find("(D)"), 0) if choices else 0)
    return text[:end], text[end + 2 :].strip() if choices else text[end + 2 :]
