"""RULER's needles in a haystack: eight tasks, and a sweep over the number of needles.

The rules, templates and sizes are NVIDIA's (github.com/NVIDIA/RULER, Hsieh et al., "RULER:
What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654), with two
differences: no key occurs twice, and each sample is fitted to the length separately.
"""

import dataclasses

import numpy as np

from lucid_jax.evaluate.tasks.ruler import NOISE, RulerTask, draw, insert_lines
from lucid_jax.evaluate.tasks.task import Sample, SampleBuilder
from lucid_jax.evaluate.tasks.texts import PROSE, Sources, essay_words, split_sentences

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic"
    " {kind} for {query} mentioned in the provided text? The special magic {kind} for {query}"
    " mentioned in the provided text are"
)
SINGLE_TEMPLATE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic"
    " {kind} for {query} mentioned in the provided text? The special magic {kind} for {query}"
    " mentioned in the provided text is"
)
_NEW_TOKENS = 128
# Where a needle may be in an essay, in percent of its sentences; so it holds at most 40 needles.
_DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)


@dataclasses.dataclass(frozen=True)
class NeedleSpec:
    """Hides `k` keys with `v` values each, and asks for the values of `q` keys."""

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
}
# The sweep over the number of needles.
for _n in (2, 4, 6, 8, 10):
    SPECS[f"niah_k{_n}"] = NeedleSpec("essay", k=_n)
    SPECS[f"niah_v{_n}"] = NeedleSpec("essay", v=_n)
    SPECS[f"niah_q{_n}"] = NeedleSpec("essay", k=_n, q=_n)


class NeedleTask(RulerTask):
    """Find the values of keys that are hidden in a long text."""

    def __init__(self, name: str, sources: Sources):
        self._spec = SPECS[name]
        in_essay = self._spec.haystack == "essay"
        self.source = "essays" if in_essay else ""
        self._essay = essay_words(sources.essays) if in_essay else ()
        self.name = f"ruler_{name}{PROSE if in_essay and not sources.essays else ''}"

    def _build(self, builder: SampleBuilder) -> Sample:
        spec = self._spec
        rng = builder.generator()
        keys = draw(rng, spec.keys, spec.k)
        values = np.array(draw(rng, spec.values, spec.k * spec.v)).reshape(spec.k, spec.v)
        needles = [
            NEEDLE.format(kind=spec.values, key=key, value=value)
            for key, values_of_key in zip(keys, values)
            for value in values_of_key
        ]
        needles = [needles[i] for i in rng.permutation(len(needles))]
        asked = rng.choice(spec.k, spec.q, replace=False)
        answers = tuple(str(value) for i in asked for value in values[i])
        query, kind, template = enumerate_keys([keys[i] for i in asked]), spec.values, TEMPLATE
        if len(answers) == 1:
            kind, template = spec.values.removesuffix("s"), SINGLE_TEMPLATE

        def render(size: int) -> str:
            context = self._hide(needles, keys, size, builder.generator("layout"))
            return template.format(context=context, query=query, kind=kind)

        smallest = 1 if spec.haystack == "essay" else len(needles)
        return builder.fit(render, answers, _NEW_TOKENS, smallest, builder.length * 2)

    def _hide(
        self, needles: list[str], keys: list[str], size: int, rng: np.random.Generator
    ) -> str:
        """Hides the needles in a haystack of `size` words of an essay, or of `size` lines."""
        if self._spec.haystack == "essay":
            return hide_in_essay(needles, self._essay, size, rng)
        lines = [NOISE] * size
        if self._spec.haystack == "needle":
            others = draw(rng, self._spec.keys, size, without=keys)
            lines = [
                NEEDLE.format(kind=self._spec.values, key=key, value=value)
                for key, value in zip(others, draw(rng, self._spec.values, size))
            ]
        return "\n".join(insert_lines(lines, needles, rng))


def hide_in_essay(
    needles: list[str], words: tuple[str, ...], size: int, rng: np.random.Generator
) -> str:
    """Hides the needles in the first `size` words of the essay, which is repeated if shorter."""
    repeats = -(-size // len(words))
    sentences = split_sentences(" ".join((words * repeats)[:size]))
    depths = np.sort(rng.choice(_DEPTHS, len(needles), replace=False))
    cuts = [0, *(int(len(sentences) * (depth / 100)) for depth in depths)]
    pieces = []
    for needle, start, end in zip(needles, cuts, cuts[1:]):
        pieces += [*sentences[start:end], needle]
    return " ".join([*pieces, *sentences[cuts[-1] :]])


def enumerate_keys(keys: list[str]) -> str:
    """Returns `a`, or `a, b, and c`."""
    if len(keys) == 1:
        return keys[0]
    return f"{', '.join(keys[:-1])}, and {keys[-1]}"
