"""RULER: verbatim templates, and samples whose contents are parsed from the prompt."""

import collections
import json
import re

import numpy as np
import pytest

from lucid_jax.evaluate.tasks import Sources, get_task
from lucid_jax.evaluate.tasks.prose import biographies, people, sentences
from lucid_jax.evaluate.tasks.ruler import insert_lines
from lucid_jax.evaluate.tasks.texts import split_sentences

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def draw(name, tokenizer, length=4096, index=0, **paths):
    return get_task(name, Sources(**paths)).sample(tokenizer, length, 42, index)


def context_of(prompt, before, after):
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    return prompt[len(before) : len(prompt) - len(after)]


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [("niah_single_1", "number", r"\d{7}"), ("niah_multikey_3", "uuid", r"[0-9a-f-]{36}")],
)
def test_single_needle(byte_tokenizer, name, kind, value):
    sample = draw(f"ruler_{name}", byte_tokenizer)
    key = re.search(rf"special magic {kind} for (.*?) mentioned in the", sample.prompt)[1]
    context = context_of(
        sample.prompt,
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it."
        f" I will quiz you about the {kind} afterwards.\n",
        f"\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special"
        f" magic {kind} for {key} mentioned in the provided text is",
    )
    (answer,) = sample.answers
    assert re.fullmatch(value, answer)
    needle = f"One of the special magic {kind}s for {key} is: {answer}."
    lines = context.split("\n")
    assert lines.count(needle) == 1
    lines.remove(needle)
    other = rf"One of the special magic {kind}s for {value} is: {value}\."
    assert all(re.fullmatch(other if kind == "uuid" else re.escape(_NOISE), x) for x in lines)
    assert sample.max_new_tokens == 128
    assert sample.stop == ()


@pytest.mark.parametrize(
    ("name", "keys", "values", "asked"),
    [
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
        ("niah_k10", 10, 1, 1),
        ("niah_v6", 1, 6, 1),
        ("niah_q8", 8, 1, 8),
    ],
)
def test_several_needles_in_an_essay(byte_tokenizer, name, keys, values, asked):
    sample = draw(f"ruler_{name}", byte_tokenizer)
    hidden = collections.defaultdict(list)
    needles = r"One of the special magic numbers for (\S+(?: \S+)?) is: (\d{7})\."
    for key, value in re.findall(needles, sample.prompt):
        hidden[key].append(value)
    assert len(hidden) == keys
    assert all(len(found) == values for found in hidden.values())
    query = re.search(r"for (.*?) mentioned in the provided text\? The", sample.prompt)[1]
    names = re.split(r", and |, ", query)
    assert len(names) == asked
    assert sorted(sample.answers) == sorted(v for name in names for v in hidden[name])


def test_needles_go_before_lines():
    """As in NVIDIA's code, no needle comes last."""
    rng = np.random.default_rng(0)
    assert insert_lines(["a"], ["x"], rng) == ["x", "a"]
    assert insert_lines(["a", "b"], ["x", "y"], rng) == ["x", "a", "y", "b"]


def test_template_for_several_needles(byte_tokenizer):
    sample = draw("ruler_niah_q2", byte_tokenizer)
    first, second = re.search(r"all the .* for (.*), and (.*) mentioned", sample.prompt).groups()
    query = f"{first}, and {second}"
    context_of(
        sample.prompt,
        "Some special magic numbers are hidden within the following text. Make sure to memorize"
        " it. I will quiz you about the numbers afterwards.\n",
        f"\nWhat are all the special magic numbers for {query} mentioned in the provided text? The"
        f" special magic numbers for {query} mentioned in the provided text are",
    )


def test_short_essays_of_the_user_are_repeated(tmp_path, byte_tokenizer):
    (tmp_path / "b.txt").write_text("It was late.\n\nNobody  came.")
    (tmp_path / "a.txt").write_text("The door stood open.")
    sample = draw("ruler_niah_k4", byte_tokenizer, essays=f"{tmp_path}/")
    text = re.sub(r"One of the special magic numbers for .*? is: \d+\. ", "", sample.prompt)
    whole = "The door stood open. It was late. Nobody came."
    assert f"afterwards.\n{whole} {whole} {whole}" in text


def test_needles_are_between_sentences_at_various_depths(byte_tokenizer):
    places = []
    for index in range(40):
        sample = draw("ruler_niah_single_2", byte_tokenizer, index=index)
        before, after = re.split(r"One of the special magic.*?\d+\.", sample.prompt, maxsplit=1)
        assert re.search(r"[.\n] ?$", before)
        places.append(len(before) / len(before + after))
    assert min(places) < 0.25
    assert max(places) > 0.75


def test_variable_tracking(byte_tokenizer):
    sample = draw("ruler_vt", byte_tokenizer)
    example, prompt = sample.prompt.split("\n\nMemorize")
    value = re.search(r"assigned the value (\d+)", prompt)[1]
    context = context_of(
        f"Memorize{prompt}",
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables"
        f" are assgined the value {value}, they are: ",
    )
    for text, letters, names in (
        (context, 5, sample.answers),
        (example, 3, example.rsplit("they are:  ")[1].split(" ")),
    ):
        lines = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", text, re.M)
        assert len(lines) == 5
        chain = [lines[0][0]]
        for name, source in lines[1:]:
            assert source == chain[-1]
            chain.append(name)
        assert tuple(chain) == tuple(names)
        assert {len(name) for name in chain} == {letters}
    assert set(context.split("\n")) - {_NOISE} == set(re.findall("^VAR.*$", context, re.M))
    assert sample.max_new_tokens == 30


@pytest.mark.parametrize(
    ("length", "common_repeats", "other_repeats"), [(4000, 6, 1), (8192, 30, 3)]
)
def test_common_words(byte_tokenizer, length, common_repeats, other_repeats):
    sample = draw("ruler_cwe", byte_tokenizer, length)
    begin = (
        "Below is a numbered list of words. In these words, some appear more often than others."
        " Memorize the ones that appear most often.\n"
    )
    end = (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words"
        " that appear most often in the list are:"
    )
    example, answered, prompt = re.split(f"{re.escape(end)}|\n(?=Below)", sample.prompt)[:3]
    counts = count_words(context_of(prompt + end, begin, end))
    assert {word for word, n in counts.items() if n == common_repeats} == set(sample.answers)
    assert set(counts.values()) == {common_repeats, other_repeats}
    solved = count_words(example.removeprefix(begin))
    common = re.split(r" ?\d+\. ", answered)[1:]
    assert solved.most_common(10) == [(w, max(solved.values())) for w, _ in solved.most_common(10)]
    assert {word for word, _ in solved.most_common(10)} == set(common)


def count_words(text):
    return collections.Counter(re.split(r" ?\b\d+\. ", text)[1:])


def test_frequent_words(byte_tokenizer):
    sample = draw("ruler_fwe", byte_tokenizer)
    context = context_of(
        sample.prompt,
        "Read the following coded text and track the frequency of each coded word. Find the three"
        " most frequently appeared coded words. ",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the"
        " three most frequently appeared words in the above coded text? Answer: According to the"
        " coded text above, the three most frequently appeared words are:",
    )
    ranks = collections.Counter(context.split(" ")).most_common(5)
    assert tuple(word for word, _ in ranks[:4]) == ("...", *sample.answers)
    # A zeta distribution with exponent 2, without a tie that would make the answer ambiguous.
    assert ranks[0][1] == pytest.approx(9 * ranks[2][1], rel=0.1)
    assert ranks[3][1] > ranks[4][1]


_RULE = (
    "Answer the question based on the given documents. Only give me the answer and do not output"
    " any other words."
)


def read_documents(prompt, query):
    context = context_of(
        prompt,
        f"{_RULE}\n\nThe following are given documents.\n\n",
        f"\n\n{_RULE}\n\nQuestion: {query} Answer:",
    )
    numbers, documents = zip(*re.findall(r"Document (\d+):\n(.*?)(?:\n\n|$)", context, re.S))
    assert numbers == tuple(str(i + 1) for i in range(len(numbers)))
    return documents


def test_squad(tmp_path, byte_tokenizer):
    def paragraph(text, *questions):
        return {
            "context": text,
            "qas": [
                {"question": q, "answers": [{"text": a} for a in answers], "is_impossible": not a}
                for q, *answers in questions
                for a in [bool(answers)]
            ],
        }

    articles = [
        [paragraph("Ann is here.", ("Who?", "Ann", "ann")), paragraph("Bob is there.", ("Why?",))],
        [paragraph(f"Filler of length {'x' * 200} {i}.") for i in range(30)],
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"data": [{"paragraphs": article} for article in articles]}))
    task = get_task("ruler_qa_1", Sources(squad=str(path)))
    assert (task.name, task.size) == ("ruler_qa_1", 1)
    sample = task.sample(byte_tokenizer, 2048, 0, 0)
    assert sample.answers == ("Ann", "ann")
    documents = read_documents(sample.prompt, "Who?")
    # The article's other paragraphs come first, and none is repeated while there are others.
    assert {"Ann is here.", "Bob is there."} < set(documents)
    assert len(set(documents)) == len(documents) < 10
    assert task.score("It is ANN", sample) == {"string_match_part": 1.0}


def test_hotpotqa(tmp_path, byte_tokenizer):
    questions = [
        {"question": f"{i}?", "answer": "yes", "context": [["A", [f"a{i}.", " b."]], ["B", ["c."]]]}
        for i in range(3)
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(questions))
    task = get_task("ruler_qa_2", Sources(hotpotqa=str(path)))
    assert (task.name, task.size) == ("ruler_qa_2", 3)
    sample = task.sample(byte_tokenizer, 1024, 0, 1)
    documents = read_documents(sample.prompt, "1?")
    assert {"A\na1. b.", "B\nc."} < set(documents)
    # There are only four documents, so they are repeated.
    assert len(documents) > 4


def test_documents_answer_the_invented_questions(byte_tokenizer):
    for index in (0, 5):
        sample = draw("ruler_qa_1", byte_tokenizer, index=index)
        name = re.search(r"was (.*) born\? Answer:$", sample.prompt)[1]
        assert f"{name} was born in {sample.answers[0]} " in sample.prompt
        sample = draw("ruler_qa_2", byte_tokenizer, index=index)
        name = re.search(r"from whom (.*) learned the trade\? Answer:$", sample.prompt)[1]
        teacher = re.search(f"{name} learned the trade from (.*?)\\.", sample.prompt)[1]
        assert f"{teacher} was born in {sample.answers[0]} " in sample.prompt
    towns = {person.town for person in people()}
    assert not [(a, b) for a in towns for b in towns if a != b and a in b]


def test_prose_has_distinct_sentences_and_no_answers():
    prose = sentences(8192)
    assert len(set(prose)) == len(prose)
    assert split_sentences(" ".join(prose)) == list(prose)
    text = " ".join((*prose, *biographies())).lower()
    assert not re.search(r"\d|-|magic|number", text)
    labels = "bathroom bedroom garden hallway kitchen office cinema park school apple football milk"
    people_of_stories = "john mary sandra daniel bill fred jeff julie"
    words = set(re.findall(r"[a-z]+", text))
    assert not words & set(f"{labels} {people_of_stories}".split())


def test_sentences_end_at_stops():
    text = 'Mr. Hale left.  "Why?" she  said. (He was late.) It was 3.5 miles! 1872 came.'
    assert split_sentences(text) == [
        "Mr. Hale left.",
        '"Why?" she said.',
        "(He was late.)",
        "It was 3.5 miles!",
        "1872 came.",
    ]
