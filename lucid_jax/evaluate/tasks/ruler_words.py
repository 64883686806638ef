"""RULER's three tasks on generated text: variable tracking, common words and frequent words.

The rules, templates and sizes are NVIDIA's (see `ruler_niah`), including the misspelling of
"assigned". Each sample is fitted to the length separately, with its answer and solved example.
"""

import functools
import itertools
import math
import string

import numpy as np

from lucid_jax.evaluate.tasks.ruler import (
    NOISE,
    RulerTask,
    compound,
    insert_lines,
    num_compounds,
    vocabulary,
)
from lucid_jax.evaluate.tasks.task import Sample, SampleBuilder

_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text."
    "\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in the text"
    " above. Answer: According to the chain(s) of variable assignment in the text above,"
    " {count} variables are assgined the value {query}, they are: "
)
_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common"
    " words in the above list? Answer: The top 10 words that appear most often in the list are:"
)
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three"
    " most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation."
    " Please ignore the dots '....'. What are the three most frequently appeared words in the"
    " above coded text? Answer: According to the coded text above, the three most frequently"
    " appeared words are:"
)
_HOPS = 4
# The most tokens, and the fewest lines of noise, of the solved example of variable tracking.
_EXAMPLE_TOKENS = 500
_EXAMPLE_NOISE = 5
_NUM_COMMON = 10
_ZETA_2 = math.pi**2 / 6
# With this many coded words or more, ranks 2 to 5 differ in frequency, so the answer is unique.
_MIN_CODED_WORDS = 80


class VariableTracking(RulerTask):
    """Name all variables of a chain of assignments."""

    name = "ruler_vt"
    _NEW_TOKENS = 30

    def _build(self, builder: SampleBuilder) -> Sample:
        example = self._example(builder)
        names, chain, value = _chain(builder.generator(), letters=5)

        def render(noise: int) -> str:
            return example + _track(chain, value, noise, builder.generator("layout"))

        return builder.fit(render, tuple(names), self._NEW_TOKENS, len(chain), builder.length)

    def _example(self, builder: SampleBuilder) -> str:
        """Returns a solved example with variables of three letters, and a blank line."""
        names, chain, value = _chain(builder.generator("example"), letters=3)
        text = ""
        for noise in itertools.count(_EXAMPLE_NOISE):
            longer = _track(chain, value, noise, builder.generator("example layout"))
            if text and builder.count(longer) > _EXAMPLE_TOKENS:
                break
            text = longer
        return f"{text} {' '.join(names)}\n\n"


def _chain(rng: np.random.Generator, letters: int) -> tuple[list[str], list[str], str]:
    """Returns the names of variables, their assignments in order, and their common value."""
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = "".join(rng.choice(list(string.ascii_uppercase), letters))
        if name not in names:
            names.append(name)
    value = str(rng.integers(10000, 99999))
    links = [f"VAR {name} = VAR {source} " for source, name in itertools.pairwise(names)]
    return names, [f"VAR {names[0]} = {value}", *links], value


def _track(chain: list[str], value: str, noise: int, rng: np.random.Generator) -> str:
    context = "\n".join(insert_lines([NOISE] * noise, chain, rng))
    return _VT.format(context=context, query=value, count=len(chain))


class CommonWords(RulerTask):
    """Name the ten words of a list that occur most often.

    Words are drawn from wonderwords. From about 100,000 tokens on the list needs more words than
    it has, and adjective-noun compounds are added; NVIDIA's code draws from a longer list that no
    package distributes.
    """

    name = "ruler_cwe"
    _NEW_TOKENS = 120

    def _build(self, builder: SampleBuilder) -> Sample:
        short = builder.length < 4096
        repeats = (6, 1) if short else (30, 3)
        example = (20, 3, 1) if short else (40, 10, 3)
        context, words = _word_list(*example, builder.generator("example"))
        solved = f"{_CWE.format(context=context)} {_number(words)}\n"

        def render(size: int) -> str:
            context, _ = _word_list(size, *repeats, builder.generator())
            return solved + _CWE.format(context=context)

        # The common words are drawn first, so that they are the same at every size.
        _, answers = _word_list(_NUM_COMMON + 1, *repeats, builder.generator())
        return builder.fit(
            render, tuple(answers), self._NEW_TOKENS, _NUM_COMMON + 1, builder.length
        )


def _word_list(
    size: int, common_repeats: int, other_repeats: int, rng: np.random.Generator
) -> tuple[str, list[str]]:
    """Returns a numbered list of `size` distinct words, each repeated, and its ten common words."""
    words = list(_shuffled_words(int(rng.integers(2**32)), size))
    common = words[:_NUM_COMMON]
    repeated = common * common_repeats + words[_NUM_COMMON:] * other_repeats
    return _number([repeated[i] for i in rng.permutation(len(repeated))]), common


@functools.lru_cache(maxsize=4)
def _shuffled_words(seed: int, size: int) -> tuple[str, ...]:
    rng = np.random.default_rng(seed)
    single = vocabulary()
    words = [single[i] for i in rng.permutation(len(single))[:size]]
    missing = size - len(words)
    more = rng.choice(num_compounds(), missing, replace=False, shuffle=False) if missing else ()
    return (*words, *(compound(int(n)) for n in more))


def _number(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class FrequentWords(RulerTask):
    """Name the three most frequent coded words; frequencies follow a zeta distribution."""

    name = "ruler_fwe"
    _NEW_TOKENS = 50

    def _build(self, builder: SampleBuilder) -> Sample:
        rng = builder.generator()
        letters = np.array(list(string.ascii_lowercase))
        size = max((builder.length - self._NEW_TOKENS) // 50, 5)
        words: dict[str, None] = {}
        while len(words) < size:
            words["".join(rng.choice(letters, 6))] = None
        # The most frequent word is noise.
        coded = np.array(["...", *words])[:size]
        shares = np.arange(1, size + 1) ** -2.0 / _ZETA_2

        def render(count: int) -> str:
            text = np.repeat(coded, (count * shares).astype(int))
            builder.generator("layout").shuffle(text)
            return _FWE.format(context=" ".join(text))

        answers = tuple(str(word) for word in coded[1:4])
        largest = max(builder.length, _MIN_CODED_WORDS)
        return builder.fit(render, answers, self._NEW_TOKENS, _MIN_CODED_WORDS, largest)
