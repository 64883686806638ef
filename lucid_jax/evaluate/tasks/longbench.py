"""LongBench's sixteen English tasks, read from a folder of the user.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding",
arXiv 2308.14508. Prompts, answer lengths and stop texts are those of lm-eval 0.4.13; a prompt
that is too long loses its middle, as in the benchmark's own code. The five Chinese tasks are
left out, since their scores need a Chinese word segmenter.
"""

import dataclasses
import functools
from collections.abc import Callable

from lucid_jax.evaluate import scores
from lucid_jax.evaluate.tasks.snapshot import column, read_rows
from lucid_jax.evaluate.tasks.task import Sample, SampleBuilder, Task
from lucid_jax.evaluate.tasks.texts import Sources

_STORY_RULE = "asconcisely as you can, using a single phrase if possible. Do not provide any"
_ARTICLE_RULE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question"
    ' cannot be answered based on the information in the article, write "unanswerable". If the'
    ' question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any'
    " explanation."
)
_PASSAGES_RULE = (
    "Answer the question based on the given passages. Only give me the answer and do not output"
    " any other words."
)
_PASSAGES = (
    f"{_PASSAGES_RULE}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES_RULE}"
    "\n\nQuestion: {question}\nAnswer:"
)
_CODE = "Please complete the code given below. \n{context}%sNext line of code:"


@dataclasses.dataclass(frozen=True)
class _Spec:
    template: str
    max_new_tokens: int
    score: Callable[..., float]
    # Only the first line of an answer counts; what follows it is another example.
    one_line: bool = False

    @property
    def metric(self) -> str:
        return _METRICS[self.score]


_METRICS: dict[Callable[..., float], str] = {
    scores.token_f1: "f1",
    scores.rouge_l_of_sentences: "rouge_l",
    scores.classification_score: "accuracy",
    scores.retrieval_score: "accuracy",
    scores.count_score: "accuracy",
    scores.code_similarity: "edit_similarity",
}
SPECS = {
    "narrativeqa": _Spec(
        "You are given a story, which can be either a novel or a movie script, and a question."
        f" Answer the question {_STORY_RULE} explanation.\n\nStory: {{context}}\n\nNow, answer the"
        f" question based on the story {_STORY_RULE} explanation.\n\nQuestion: {{question}}"
        "\n\nAnswer:",
        128,
        scores.token_f1,
    ),
    "qasper": _Spec(
        "You are given a scientific article and a question. Answer the question"
        f" {_ARTICLE_RULE}\n\nArticle: {{context}}\n\n Answer the question based on the above"
        f" article {_ARTICLE_RULE}\n\nQuestion: {{question}}\n\nAnswer:",
        128,
        scores.token_f1,
    ),
    "multifieldqa_en": _Spec(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following"
        " question based on the above text, only give me the answer and do not output any other"
        " words.\n\nQuestion: {question}\nAnswer:",
        64,
        scores.token_f1,
    ),
    "hotpotqa": _Spec(_PASSAGES, 32, scores.token_f1),
    "2wikimqa": _Spec(_PASSAGES, 32, scores.token_f1),
    "musique": _Spec(_PASSAGES, 32, scores.token_f1),
    "gov_report": _Spec(
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        scores.rouge_l_of_sentences,
    ),
    "qmsum": _Spec(
        "You are given a meeting transcript and a query containing a question or instruction."
        " Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the"
        " query based on the above meeting transcript in one or more sentences.\n\nQuery:"
        " {question}\nAnswer:",
        512,
        scores.rouge_l_of_sentences,
    ),
    "multi_news": _Spec(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        scores.rouge_l_of_sentences,
    ),
    "trec": _Spec(
        "Please determine the type of the question below. Here are some examples of questions."
        "\n\n{context}\n{question}",
        64,
        scores.classification_score,
        one_line=True,
    ),
    "triviaqa": _Spec(
        "Answer the question based on the given passage. Only give me the answer and do not"
        " output any other words. The following are some examples.\n\n{context}\n{question}",
        32,
        scores.token_f1,
        one_line=True,
    ),
    "samsum": _Spec(
        "Summarize the dialogue into a few short sentences. The following are some examples."
        "\n\n{context}\n{question}",
        128,
        scores.rouge_l_of_sentences,
        one_line=True,
    ),
    "passage_count": _Spec(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates."
        " Please carefully read these paragraphs and determine how many unique paragraphs there"
        " are after removing duplicates. In other words, how many non-repeating paragraphs are"
        " there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after"
        " removing duplicates. The output format should only contain the number, such as 1, 2, 3,"
        " and so on.\n\nThe final answer is:",
        32,
        scores.count_score,
    ),
    "passage_retrieval_en": _Spec(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which"
        " paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n"
        "{question}\n\nPlease enter the number of the paragraph that the abstract is from. The"
        ' answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is:',
        32,
        scores.retrieval_score,
    ),
    "lcc": _Spec(_CODE % "", 64, scores.code_similarity),
    "repobench-p": _Spec(_CODE % "{question}", 64, scores.code_similarity),
}


class LongBench(Task):
    """Sample `index` is row `index` of the task's files, whatever the seed."""

    source = "longbench"

    def __init__(self, name: str, sources: Sources):
        self._spec = SPECS[name]
        self._rows = read_rows(self.source, name, "test", sources.longbench)
        self.name = f"longbench_{name}"
        self.metric = self._spec.metric
        self.size = len(self._rows)

    def _build(self, builder: SampleBuilder) -> Sample:
        spec, row = self._spec, self._rows[builder.index]
        # Copies of the benchmark differ in the name of this column.
        question = column(row, "input", "question")
        prompt = spec.template.format(context=column(row, "context"), question=question)
        meta = {}
        if spec.score is scores.classification_score:
            meta["classes"] = list(column(row, "all_classes"))
        answers = tuple(map(str, column(row, "answers")))
        stop = ("\n",) if spec.one_line else ()
        return builder.truncate(prompt, answers, spec.max_new_tokens, head=0.5, stop=stop, **meta)

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """See `Task`: the best score against any of the answers."""
        if self._spec.one_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        score = self._spec.score
        if score is scores.classification_score:
            score = functools.partial(score, classes=sample.meta["classes"])
        return {self.metric: scores.best(score, prediction, sample.answers)}
