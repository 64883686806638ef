"""RULER's three tasks on generated text: variable tracking, common and frequent words.

The rules, templates and sizes are NVIDIA's (see `ruler_niah`), with its misspelling of
"assigned". Every sample is fitted by itself, answer and solved example included.
"""

from __future__ import annotations

import functools
import itertools
import math
import string

import numpy as np

from lucid_jax.evaluate.scores import string_match_all
from lucid_jax.evaluate.tasks.ruler_niah import NOISE, insert
from lucid_jax.evaluate.tasks.task import Budget, Sample, Task
from lucid_jax.evaluate.tasks.words import compound, compounds, vocabulary

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
# Tokens of the solved example of variable tracking, which has at least so much noise.
_EXAMPLE_TOKENS = 500
_EXAMPLE_NOISE = 5
_COMMON = 10
_ZETA_2 = math.pi**2 / 6
# From here on the ranks 2 to 5 occur in different numbers, so that the answer is one.
_FEWEST_CODED_WORDS = 80


class _WordTask(Task):
    metric = "string_match_all"

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """See `Task`."""
        return {self.metric: string_match_all(prediction, sample.answers)}


class VariableTracking(_WordTask):
    """Name all variables of a chain of assignments."""

    name = "ruler_vt"
    _NEW_TOKENS = 30

    def _sample(self, budget: Budget, key: tuple[int, int]) -> Sample:
        example = self._example(budget, key)
        names, chain, value = _chain(budget.generator(key), letters=5)

        def render(noise: int) -> str:
            return example + _track(chain, value, noise, budget.generator(key, "layout"))

        prompt, tokens = budget.fit(render, self._NEW_TOKENS, len(chain), budget.length)
        return Sample(prompt, tuple(names), self._NEW_TOKENS, meta={"prompt_tokens": tokens})

    def _example(self, budget: Budget, key: tuple[int, int]) -> str:
        """A solved example with variables of three letters, apart by a blank line."""
        names, chain, value = _chain(budget.generator(key, "example"), letters=3)
        noise, text = _EXAMPLE_NOISE, ""
        while True:
            longer = _track(chain, value, noise, budget.generator(key, "example layout"))
            if text and budget.count(longer) > _EXAMPLE_TOKENS:
                return f"{text} {' '.join(names)}\n\n"
            noise, text = noise + 1, longer


def _chain(rng: np.random.Generator, letters: int) -> tuple[list[str], list[str], str]:
    """Names of variables, their assignments in order, and the value of all."""
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = "".join(rng.choice(list(string.ascii_uppercase), letters))
        if name not in names:
            names.append(name)
    value = str(rng.integers(10000, 99999))
    links = [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
    return names, [f"VAR {names[0]} = {value}", *links], value


def _track(chain: list[str], value: str, noise: int, rng: np.random.Generator) -> str:
    context = "\n".join(insert([NOISE] * noise, chain, rng))
    return _VT.format(context=context, query=value, count=len(chain))


class CommonWords(_WordTask):
    """Name the ten words of a list that occur most often.

    The list is drawn from wonderwords. Where it needs more words than those, which it does
    from about 100,000 tokens on, the rest are its adjective-noun compounds; NVIDIA's code
    draws all of them from a longer list that no package distributes.
    """

    name = "ruler_cwe"
    _NEW_TOKENS = 120

    def _sample(self, budget: Budget, key: tuple[int, int]) -> Sample:
        short = budget.length < 4096
        repeats = (6, 1) if short else (30, 3)
        shape = (20, 3, 1) if short else (40, 10, 3)
        context, words = _word_list(*shape, budget.generator(key, "example"))
        solved = f"{_CWE.format(context=context)} {_number(words)}\n"

        def render(size: int) -> str:
            context, _ = _word_list(size, *repeats, budget.generator(key))
            return solved + _CWE.format(context=context)

        prompt, tokens = budget.fit(render, self._NEW_TOKENS, _COMMON + 1, budget.length)
        # The words that are common are drawn first, so that every size has the same.
        _, answers = _word_list(_COMMON + 1, *repeats, budget.generator(key))
        return Sample(prompt, tuple(answers), self._NEW_TOKENS, meta={"prompt_tokens": tokens})


def _word_list(size: int, often: int, seldom: int, rng) -> tuple[str, list[str]]:
    """A numbered list of `size` words in many repeats, and those ten that it has most of."""
    words = list(_shuffled_words(int(rng.integers(2**32)), size))
    common = words[:_COMMON]
    listed = common * often + words[_COMMON:] * seldom
    return _number([listed[i] for i in rng.permutation(len(listed))]), common


@functools.lru_cache(maxsize=4)
def _shuffled_words(seed: int, size: int) -> tuple[str, ...]:
    rng = np.random.default_rng(seed)
    single = vocabulary()
    words = [single[i] for i in rng.permutation(len(single))[:size]]
    missing = size - len(words)
    more = rng.choice(compounds(), missing, replace=False, shuffle=False) if missing else ()
    return (*words, *(compound(int(n)) for n in more))


def _number(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class FrequentWords(_WordTask):
    """Name the three coded words that occur most often, by a zeta distribution."""

    name = "ruler_fwe"
    _NEW_TOKENS = 50

    def _sample(self, budget: Budget, key: tuple[int, int]) -> Sample:
        rng = budget.generator(key)
        letters = np.array(list(string.ascii_lowercase))
        size = max((budget.length - self._NEW_TOKENS) // 50, 5)
        words: dict[str, None] = {}
        while len(words) < size:
            words["".join(rng.choice(letters, 6))] = None
        # The word of the first rank is noise.
        coded = np.array(["...", *words])[:size]
        shares = np.arange(1, size + 1) ** -2.0 / _ZETA_2

        def render(count: int) -> str:
            text = np.repeat(coded, (count * shares).astype(int))
            budget.generator(key, "layout").shuffle(text)
            return _FWE.format(context=" ".join(text))

        prompt, tokens = budget.fit(
            render, self._NEW_TOKENS, _FEWEST_CODED_WORDS, max(budget.length, _FEWEST_CODED_WORDS)
        )
        answers = tuple(str(word) for word in coded[1:4])
        return Sample(prompt, answers, self._NEW_TOKENS, meta={"prompt_tokens": tokens})
