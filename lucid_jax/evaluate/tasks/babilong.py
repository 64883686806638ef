"""BABILong: the facts of a bAbI story, scattered in order over a long text.

The rules, prompts and scores are those of Kuratov et al., "BABILong: Testing the Limits of
LLMs with Long Context Reasoning-in-a-Haystack", arXiv 2406.10149. Stories are generated
(`babi`). Lengths count the whole prompt and the answer in the model's tokens, whereas the
benchmark counts only the text, in GPT-2's tokens.
"""

from collections.abc import Sequence

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.tokenizer import Tokenizer
from lucid_jax.evaluate.scores import babilong_lenient, babilong_strict
from lucid_jax.evaluate.tasks.babi import COUNTS, GIVERS, PLACES, STORIES, THINGS, Story
from lucid_jax.evaluate.tasks.babilong_prompts import PROMPTS, TEMPLATE
from lucid_jax.evaluate.tasks.task import Sample, SampleBuilder, Task
from lucid_jax.evaluate.tasks.texts import PROSE, Sources, open_documents, split_sentences

# All possible answers of each task, which the strict score looks for.
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": (*GIVERS, *THINGS),
    **dict.fromkeys(("qa6", "qa9"), ("no", "yes")),
    "qa7": COUNTS,
    "qa8": (*THINGS, "nothing"),
    "qa10": ("maybe", "no", "yes"),
}
_NEW_TOKENS = 20
# The longest answers in the form that the prompt asks for, if that is more than a word. The limit
# on new tokens is raised to their size, in case the tokenizer splits words into letters.
_LONGEST = {
    "qa1": "The most recent location of Sandra is bathroom.",
    "qa2": "The football is in the bathroom.",
    "qa3": "Before the bathroom the football was in the bathroom.",
}
# How many stories are drawn until one fits.
_STORIES = 20
# Sentences of fewer tokens are left out of the background.
_MIN_SENTENCE_TOKENS = 10
# More than a token has on average, so that one passage of a book is usually enough.
_CHARACTERS_PER_TOKEN = 10
# If this many passages in a row have no sentence, the books are not text.
_MAX_EMPTY_PASSAGES = 100


class BabiLong(Task):
    """Answer a question on facts that are hidden in a long text."""

    metric = "strict"
    source = "books"

    def __init__(self, name: str, sources: Sources):
        self._story = STORIES[name]
        self._labels = LABELS[name]
        self._prompt = PROMPTS[name]
        self._longest = _LONGEST.get(name, "")
        self._books = open_documents(sources.books)
        self.name = f"babilong_{name}{'' if sources.books else PROSE}"

    def _build(self, builder: SampleBuilder) -> Sample:
        new_tokens = max(_NEW_TOKENS, len(builder.tokenizer.encode(self._longest)))
        story, facts_only = self._draw(builder, builder.length - new_tokens)
        room = builder.length - new_tokens - builder.check(facts_only, new_tokens)
        background = _Background(
            self._books, room, builder.tokenizer, builder.generator("background")
        )

        def render(size: int) -> str:
            sentences = background.first_tokens(size)
            return self._render(story, _scatter(story.facts, sentences, builder.generator("slots")))

        return builder.fit(render, (story.answer,), new_tokens, 0, room, question=story.question)

    def _draw(self, builder: SampleBuilder, room: int) -> tuple[Story, str]:
        """Draws stories until one fits; returns the last and its prompt without background.

        The benchmark also leaves out stories with too many facts.
        """
        for attempt in range(_STORIES):
            story = self._story(builder.generator(f"story {attempt}"))
            prompt = self._render(story, story.facts)
            if builder.count(prompt) <= room:
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


def _scatter(
    facts: Sequence[str], background: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """Inserts `facts`, in order, at uniformly drawn places between sentences or at the ends."""
    places = np.sort(rng.integers(len(background) + 1, size=len(facts)))
    text = list(background)
    # From the last to the first, so that earlier places stay valid.
    for place, fact in zip(places[::-1].tolist(), reversed(facts)):
        text.insert(place, fact)
    return text


class _Background:
    """Passages from random places of random books, `room` tokens or more in total."""

    def __init__(
        self, books: Sequence[str], room: int, tokenizer: Tokenizer, rng: np.random.Generator
    ):
        self._tokenizer = tokenizer
        self._sentences: list[str] = []
        self._tokens: list[np.ndarray] = []
        total, empty = 0, 0
        while total < room:
            before = total
            for sentence in _passage(books, _CHARACTERS_PER_TOKEN * room, rng):
                tokens = tokenizer.encode(sentence)
                if len(tokens) >= _MIN_SENTENCE_TOKENS:
                    self._sentences.append(sentence)
                    self._tokens.append(tokens)
                    total += len(tokens)
                if total >= room:
                    break
            empty = 0 if total > before else empty + 1
            if empty == _MAX_EMPTY_PASSAGES:
                raise ConfigError(f"the books have no sentences of {_MIN_SENTENCE_TOKENS} tokens")
        self._ends = np.cumsum([0, *map(len, self._tokens)])

    def first_tokens(self, size: int) -> list[str]:
        """Returns the sentences of the first `size` tokens; the last one may be cut."""
        whole = int(np.searchsorted(self._ends, size, side="right")) - 1
        rest = size - int(self._ends[whole])
        cut = [self._tokenizer.decode(self._tokens[whole][:rest])] if rest else []
        return self._sentences[:whole] + cut


def _passage(books: Sequence[str], characters: int, rng: np.random.Generator) -> list[str]:
    """Returns the whole sentences of about `characters` characters at a random place."""
    text = books[int(rng.integers(len(books)))]
    # The start is uniform over the book, although little text follows the last sentences.
    start = int(rng.integers(max(len(text), 1)))
    # The first and last sentences may be incomplete.
    return split_sentences(text[start : start + max(characters, 1000)])[1:-1]
