"""BABILong: facts of a bAbI story, scattered in order over a long text.

The rules, prompts and scores are those of Kuratov et al., "BABILong: Testing the Limits of
LLMs with Long Context Reasoning-in-a-Haystack", arXiv 2406.10149. Stories are generated
(`babi`). Lengths count the whole prompt and the answer in the model's own tokens, where the
benchmark's count only the text, in GPT-2's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.scores import babilong_lenient, babilong_strict
from lucid_jax.evaluate.tasks.babi import COUNTS, GIVERS, PLACES, STORIES, THINGS, Story
from lucid_jax.evaluate.tasks.babilong_prompts import PROMPTS, TEMPLATE
from lucid_jax.evaluate.tasks.task import Budget, Sample, Task
from lucid_jax.evaluate.tasks.texts import PROSE, Sources, open_books, split_sentences

# All answers of a task, which the strict score looks for.
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": (*GIVERS, *THINGS),
    **dict.fromkeys(("qa6", "qa9"), ("no", "yes")),
    "qa7": COUNTS,
    "qa8": (*THINGS, "nothing"),
    "qa10": ("maybe", "no", "yes"),
}
_NEW_TOKENS = 20
# The longest answers in the form that the prompt asks for. A tokenizer that cuts words into
# letters gets as many tokens as they take: the last word of the form is the answer.
_LONGEST = {
    "qa1": "The most recent location of Sandra is bathroom.",
    "qa2": "The football is in the bathroom.",
    "qa3": "Before the bathroom the football was in the bathroom.",
}
# How many stories are tried where one is too long.
_STORIES = 20
# A sentence of fewer tokens is left out of the background.
_SHORTEST = 10
# More characters than a token has on average, so that one stretch of a book mostly suffices.
_LETTERS_PER_TOKEN = 10
# So many stretches in a row without a sentence: the books are not text.
_PATIENCE = 100


class BabiLong(Task):
    """Answer a question on facts that a long text hides. `meta` has the question."""

    metric = "strict"
    source = "books"

    def __init__(self, name: str, sources: Sources):
        self._story = STORIES[name]
        self._labels = LABELS[name]
        self._prompt = PROMPTS[name]
        self._longest = _LONGEST.get(name, "")
        self._books = open_books(sources.books)
        self.name = f"babilong_{name}{'' if sources.books else PROSE}"

    def _sample(self, budget: Budget, key: tuple[int, int]) -> Sample:
        new_tokens = max(_NEW_TOKENS, len(budget.tokenizer.encode(self._longest)))
        story, facts_alone = self._draw(budget, key, budget.length - new_tokens)
        room = budget.length - new_tokens - budget.check(facts_alone, new_tokens)
        sentences = _Background(self._books, room, budget, budget.generator(key, "background"))

        def render(size: int) -> str:
            slots = budget.generator(key, "slots")
            return self._render(story, _scatter(story.facts, sentences.cut(size), slots))

        prompt, tokens = budget.fit(render, new_tokens, 0, room)
        meta = {"prompt_tokens": tokens, "question": story.question}
        return Sample(prompt, (story.answer,), new_tokens, meta=meta)

    def _draw(self, budget: Budget, key: tuple[int, int], room: int) -> tuple[Story, str]:
        """A story that fits, if one of a few does, and its prompt without background.

        The benchmark, too, leaves out stories of too many facts.
        """
        for attempt in range(_STORIES):
            story = self._story(budget.generator(key, f"story {attempt}"))
            prompt = self._render(story, story.facts)
            if budget.count(prompt) <= room:
                break
        return story, prompt

    def _render(self, story: Story, context: Sequence[str]) -> str:
        return TEMPLATE.format(
            instruction=self._prompt.instruction,
            examples=self._prompt.examples,
            post_prompt=self._prompt.post_prompt,
            context=" ".join(context).strip(),
            question=story.question,
        )

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """See `Task`: `strict`, the benchmark's own, and `lenient`, lm-eval's."""
        (target,) = sample.answers
        question = sample.meta["question"]
        return {
            "strict": babilong_strict(prediction, target, question, self._labels),
            "lenient": babilong_lenient(prediction, target),
        }


def _scatter(facts: Sequence[str], background: Sequence[str], rng) -> list[str]:
    """`facts`, in order, each before a sentence or after the last, drawn uniformly."""
    places = np.sort(rng.integers(len(background) + 1, size=len(facts)))
    # The facts go in from the last to the first, so that the places before stay right.
    text = list(background)
    for place, fact in zip(places[::-1].tolist(), reversed(facts)):
        text.insert(place, fact)
    return text


class _Background:
    """Sentences in a row from random places of random books, of `room` tokens in all."""

    def __init__(self, books: Sequence[str], room: int, budget: Budget, rng: np.random.Generator):
        self._tokenizer = budget.tokenizer
        self._sentences: list[str] = []
        self._tokens: list[np.ndarray] = []
        total, empty = 0, 0
        while total < room:
            before = total
            for sentence in _stretch(books, _LETTERS_PER_TOKEN * room, rng):
                tokens = self._tokenizer.encode(sentence)
                if len(tokens) >= _SHORTEST:
                    self._sentences.append(sentence)
                    self._tokens.append(tokens)
                    total += len(tokens)
                if total >= room:
                    break
            empty = 0 if total > before else empty + 1
            if empty == _PATIENCE:
                raise ConfigError(f"the books have no sentences of {_SHORTEST} tokens")
        self._ends = np.cumsum([0, *map(len, self._tokens)])

    def cut(self, size: int) -> list[str]:
        """The first `size` tokens; the last sentence ends where they do."""
        whole = int(np.searchsorted(self._ends, size, side="right")) - 1
        rest = size - int(self._ends[whole])
        cut = [self._tokenizer.decode(self._tokens[whole][:rest])] if rest else []
        return self._sentences[:whole] + cut


def _stretch(books: Sequence[str], letters: int, rng: np.random.Generator) -> list[str]:
    """Whole sentences of about `letters` letters from a random place of a random book."""
    text = books[int(rng.integers(len(books)))]
    # The place is drawn from all of a book, though from its last sentences little follows.
    start = int(rng.integers(max(len(text), 1)))
    # The first and the last are parts of sentences.
    return split_sentences(text[start : start + max(letters, 1000)])[1:-1]
