"""RULER's needles in a haystack: eight tasks, and a sweep over the number of needles.

The rules, templates and sizes are NVIDIA's (github.com/NVIDIA/RULER, Hsieh et al., "RULER:
What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654). Two
things differ: no key occurs twice, and every sample is fitted by itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lucid_jax.evaluate.scores import string_match_all
from lucid_jax.evaluate.tasks.task import Budget, Sample, Task
from lucid_jax.evaluate.tasks.texts import PROSE, Sources, essay_words, split_sentences
from lucid_jax.evaluate.tasks.words import draw

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic"
    " {kind} for {query} mentioned in the provided text? The special magic {kind} for {query}"
    " mentioned in the provided text are"
)
_TEMPLATE_OF_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic"
    " {kind} for {query} mentioned in the provided text? The special magic {kind} for {query}"
    " mentioned in the provided text is"
)
_NEW_TOKENS = 128
# In percent of the haystack's sentences; an essay takes at most this many needles.
_DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)


@dataclasses.dataclass(frozen=True)
class NeedleSpec:
    """What is hidden and asked: `k` keys of `v` values each, `q` keys asked."""

    haystack: str  # "noise", "essay" or "needle"
    keys: str = "words"  # or "uuids"
    values: str = "numbers"  # or "uuids"
    k: int = 1
    v: int = 1
    q: int = 1


SPECS = {
    "niah_single_1": NeedleSpec("noise"),
    "niah_single_2": NeedleSpec("essay"),
    "niah_single_3": NeedleSpec("essay", values="uuids"),
    "niah_multikey_1": NeedleSpec("essay", k=4),
    "niah_multikey_2": NeedleSpec("needle"),
    "niah_multikey_3": NeedleSpec("needle", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleSpec("essay", v=4),
    "niah_multiquery": NeedleSpec("essay", k=4, q=4),
} | {
    # The sweep. A key that is asked has to be there, so that q brings k with it.
    name: spec
    for n in (2, 4, 6, 8, 10)
    for name, spec in (
        (f"niah_k{n}", NeedleSpec("essay", k=n)),
        (f"niah_v{n}", NeedleSpec("essay", v=n)),
        (f"niah_q{n}", NeedleSpec("essay", k=n, q=n)),
    )
}


class NeedleTask(Task):
    """Find the values of keys that are hidden in a long text."""

    metric = "string_match_all"

    def __init__(self, name: str, sources: Sources):
        self._spec = SPECS[name]
        in_essay = self._spec.haystack == "essay"
        self.source = "essays" if in_essay else ""
        self._essay = essay_words(sources.essays) if in_essay else ()
        self.name = f"ruler_{name}{PROSE if in_essay and not sources.essays else ''}"

    def _sample(self, budget: Budget, key: tuple[int, int]) -> Sample:
        spec = self._spec
        rng = budget.generator(key)
        keys = draw(rng, spec.keys, spec.k)
        values = np.array(draw(rng, spec.values, spec.k * spec.v)).reshape(spec.k, spec.v)
        needles = [
            _NEEDLE.format(kind=spec.values, key=k, value=value)
            for k, row in zip(keys, values)
            for value in row
        ]
        needles = [needles[i] for i in rng.permutation(len(needles))]
        asked = rng.choice(spec.k, spec.q, replace=False)
        question = {"query": _join([keys[i] for i in asked]), "kind": spec.values}
        template = _TEMPLATE
        if spec.q * spec.v == 1:
            template, question["kind"] = _TEMPLATE_OF_ONE, spec.values.removesuffix("s")

        def render(size: int) -> str:
            layout = budget.generator(key, "layout")
            return template.format(context=self._hide(needles, keys, size, layout), **question)

        smallest = 1 if spec.haystack == "essay" else len(needles)
        prompt, tokens = budget.fit(render, _NEW_TOKENS, smallest, budget.length * 2)
        answers = tuple(str(value) for i in asked for value in values[i])
        return Sample(prompt, answers, _NEW_TOKENS, meta={"prompt_tokens": tokens})

    def _hide(self, needles: list[str], keys: list[str], size: int, rng) -> str:
        """The needles in a haystack of `size` words of an essay, or of `size` lines."""
        if self._spec.haystack == "essay":
            return _hide_in_essay(needles, self._essay, size, rng)
        lines = [NOISE] * size
        if self._spec.haystack == "needle":
            others = draw(rng, self._spec.keys, size, without=keys)
            lines = [
                _NEEDLE.format(kind=self._spec.values, key=k, value=value)
                for k, value in zip(others, draw(rng, self._spec.values, size))
            ]
        return "\n".join(insert(lines, needles, rng))

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """See `Task`."""
        return {self.metric: string_match_all(prediction, sample.answers)}


def insert(lines: list[str], items: list[str], rng: np.random.Generator) -> list[str]:
    """`lines` with `items`, in their order, before distinct lines that are drawn."""
    places = np.sort(rng.choice(len(lines), len(items), replace=False))
    item_before = dict(zip(places.tolist(), items))
    return [x for i, line in enumerate(lines) for x in (item_before.get(i), line) if x]


def _hide_in_essay(needles: list[str], words: tuple[str, ...], size: int, rng) -> str:
    """The first `size` words of the essay, again from its beginning where it ends."""
    repeats = -(-size // len(words))
    sentences = split_sentences(" ".join((words * repeats)[:size]))
    depths = np.sort(rng.choice(_DEPTHS, len(needles), replace=False))
    cuts = [0, *(int(len(sentences) * (depth / 100)) for depth in depths)]
    pieces = []
    for needle, start, end in zip(needles, cuts, cuts[1:]):
        pieces += [*sentences[start:end], needle]
    return " ".join([*pieces, *sentences[cuts[-1] :]])


def _join(keys: list[str]) -> str:
    if len(keys) == 1:
        return keys[0]
    return f"{', '.join(keys[:-1])}, and {keys[-1]}"
