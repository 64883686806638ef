"""BABILong: verbatim prompts, stories checked by an independent reader, and their layout."""

import collections
import dataclasses
import hashlib
import re

import numpy as np
import pytest

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.tasks import Sources, get_task
from lucid_jax.evaluate.tasks.babi import STORIES
from lucid_jax.evaluate.tasks.babilong import LABELS
from lucid_jax.evaluate.tasks.babilong_prompts import PROMPTS

# Hashes of the benchmark's own strings: instruction, examples and post-prompt, joined by "|".
_DIGESTS = {
    "qa1": "a9fde77be8f0a243",
    "qa2": "20b8f7d22af657a4",
    "qa3": "f68bd6a7e81d67f1",
    "qa4": "ba2debbda32e65f5",
    "qa5": "cafb35be16b73882",
    "qa6": "4f71ac518c4fab85",
    "qa7": "0a84e41d880a1daf",
    "qa8": "c0e4f7391efcd085",
    "qa9": "a141b98b8609b18f",
    "qa10": "963ec734a418327b",
}


@pytest.mark.parametrize("name", _DIGESTS)
def test_prompts_are_verbatim(name):
    text = "|".join(dataclasses.asdict(PROMPTS[name]).values())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == _DIGESTS[name]


def test_whole_prompt(byte_tokenizer):
    sample = get_task("babilong_qa4").sample(byte_tokenizer, 4096, 0, 0)
    parts = dataclasses.astuple(PROMPTS["qa4"])
    assert sample.prompt.startswith("\n\n".join((*parts, "<context>\n")))
    assert sample.prompt.endswith(f"\n</context>\n\nQuestion: {sample.meta['question']}")
    assert sample.max_new_tokens == 20


def test_answers_in_the_requested_form_fit(tokenizer):
    for name, answer in (
        ("qa1", "The most recent location of Daniel is bedroom."),
        ("qa2", "The football is in the bathroom."),
        ("qa3", "Before the hallway the football was in the bathroom."),
        ("qa8", "apple,football,milk"),
    ):
        sample = get_task(f"babilong_{name}").sample(tokenizer, 4096, 0, 0)
        assert sample.max_new_tokens >= max(len(tokenizer.encode(answer)), 20)


def read(facts):
    """Returns what a reader knows: places of people, holders and paths of things, the last gift."""
    place, holder, path, exact = {}, {}, collections.defaultdict(list), {}
    gift = None
    for fact in facts:
        words = fact.rstrip(".").split()
        who, thing = words[0], next((w for w in words if w in ("apple", "football", "milk")), None)
        if " either " in fact:
            exact[who] = {words[5], words[8]}
        elif " not in " in fact or " no longer in " in fact:
            exact[who] = ("not", words[-1])
        elif thing is None:
            place[who], exact[who] = words[-1], {words[-1]}
        elif words[1] in ("gave", "handed", "passed"):
            holder[thing], gift = words[-1], (who, thing, words[-1])
        elif words[1] in ("got", "grabbed", "picked", "took"):
            holder[thing] = who
        else:
            assert holder.pop(thing) == who
        for held, person in holder.items():
            if person in place and path[held][-1:] != [place[person]]:
                path[held].append(place[person])
    return place, holder, path, exact, gift


def answer(facts, question):
    """Answers by rules that share no code with those that made the story."""
    place, holder, path, exact, gift = read(facts)
    words = question.rstrip("?").split()
    match words:
        case ["Where", "is", "the", thing]:
            return path[thing][-1]
        case ["Where", "is", who]:
            return place[who]
        case ["Where", "was", "the", thing, "before", "the", where]:
            assert path[thing].count(where) == 1
            return path[thing][path[thing].index(where) - 1]
        case ["Is", who, "in", "the", where]:
            if isinstance(exact[who], tuple):
                assert exact[who] == ("not", where)
                return "no"
            if where not in exact[who]:
                return "no"
            return "yes" if len(exact[who]) == 1 else "maybe"
        case ["How", "many", "objects", "is", who, "carrying"]:
            return ("none", "one", "two", "three")[sum(p == who for p in holder.values())]
        case ["What", "is", who, "carrying"]:
            held = [t for t in ("apple", "football", "milk") if holder.get(t) == who]
            return ",".join(held) or "nothing"
        case ["What", "did", giver, "give", "to", taker]:
            assert (giver, taker) == (gift[0], gift[2])
            return gift[1]
        case ["Who", "gave", "the", thing, *_]:
            assert thing == gift[1]
            return gift[0]
        case ["Who", "received", "the", thing] | ["Who", "did", _, "give", "the", thing, "to"]:
            assert thing == gift[1]
            return gift[2]
        case ["What", "is", toward, "of", "the", where]:
            return next(a for a, d, b in directions(facts) if (d, b) == (toward, where))
        case ["What", "is", "the", where, toward, "of"]:
            return next(b for a, d, b in directions(facts) if (a, d) == (where, toward))
    raise AssertionError(question)


def directions(facts):
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    facts = [re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups() for fact in facts]
    return facts + [(b, back[d], a) for a, d, b in facts]


@pytest.mark.parametrize("name", STORIES)
def test_stories_imply_their_answers(name):
    stories = [STORIES[name](np.random.default_rng(seed)) for seed in range(300)]
    for story in stories:
        assert answer(story.facts, story.question) == story.answer, story
        assert set(story.answer.split(",")) <= set(LABELS[name])
    counts = collections.Counter(story.answer for story in stories)
    # Always giving the same answer must not score well, and stories must vary.
    assert max(counts.values()) < 0.65 * len(stories)
    assert len({story.facts for story in stories}) > 0.85 * len(stories)


def test_facts_are_spread_over_the_context_in_order(byte_tokenizer):
    task = get_task("babilong_qa1")
    depths = []
    for index in range(60):
        prompt = task.sample(byte_tokenizer, 4096, 0, index).prompt
        context = prompt.split("<context>\n")[1].split("\n</context>")[0]
        fact = r"\b(?:John|Mary|Sandra|Daniel) (?:went|went back|moved|travelled|journeyed) to the"
        found = list(re.finditer(rf"{fact} (\w+)\.", context))
        facts = [match[0] for match in found]
        assert (
            answer(facts, prompt.rsplit("Question: ")[1])
            == task.sample(byte_tokenizer, 4096, 0, index).answers[0]
        )
        depths += [match.start() / len(context) for match in found]
    assert np.histogram(depths, 4, (0, 1))[0].min() > 0.15 * len(depths)


def test_background_comes_from_the_users_books(tmp_path, byte_tokenizer):
    for name in "ab":
        lines = [f"This is the sentence of book {name} numbered {i}. Short." for i in range(500)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    task = get_task("babilong_qa1", Sources(books=f"{tmp_path}/"))
    assert task.name == "babilong_qa1"
    books = set()
    for index in range(8):
        prompt = task.sample(byte_tokenizer, 4096, 0, index).prompt
        books |= set(re.findall(r"of book (\w)", prompt))
        # Sentences of fewer than ten tokens are left out, and the others keep their order.
        assert "Short" not in prompt
        numbers = [int(n) for n in re.findall(r"numbered (\d+)\.", prompt)]
        steps = np.diff(numbers)
        assert np.mean(steps == 1) > 0.8
    assert books == {"a", "b"}


def test_books_without_sentences_are_refused(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("No. " * 1000)
    task = get_task("babilong_qa1", Sources(books=f"{tmp_path}/a.txt"))
    with pytest.raises(ConfigError, match="no sentences of 10 tokens"):
        task.sample(byte_tokenizer, 4096, 0, 0)


def test_stories_that_are_too_long_are_drawn_again(byte_tokenizer):
    task = get_task("babilong_qa3")
    for index in range(20):
        task.sample(byte_tokenizer, 2048, 0, index)


def test_strict_and_lenient_scores(byte_tokenizer):
    task = get_task("babilong_qa1")
    sample = task.sample(byte_tokenizer, 4096, 0, 0)
    right = sample.answers[0]
    assert task.score(f"It is the {right}.", sample) == {"strict": 1, "lenient": 1}
    assert task.score(", ".join(LABELS["qa1"]), sample) == {"strict": 0, "lenient": 1}
    assert task.metric == "strict"
