"""Properties of every task: samples fit and fill their length, and are reproducible."""

import hashlib
import os
import subprocess
import sys

import pytest

from lucid_jax.config import ConfigError
from lucid_jax.data import load_tokenizer
from lucid_jax.evaluate.tasks import Sources, get_task, task_names

GENERATED = [n for n in task_names() if not n.startswith(("longbench", "scrolls"))]
# One or two tasks of each family.
SOME = ["ruler_niah_multikey_1", "ruler_niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe",
        "ruler_qa_1", "babilong_qa2"]  # fmt: skip
NAMES = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in GENERATED]
# The longest step by which a prompt grows, a document, has at most this many bytes.
_LARGEST_STEP = 500


def cost(tokenizer, sample):
    """Returns the tokens that a model sees: BOS, the prompt and the answer."""
    return 1 + len(tokenizer.encode(sample.prompt)) + sample.max_new_tokens


@pytest.mark.parametrize("length", [2600, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_samples_fill_the_length_and_hold_their_answers(tokenizer, name, length):
    task = get_task(name)
    for seed, index in ((0, 0), (7, 3)):
        sample = task.sample(tokenizer, length, seed, index)
        assert length - _LARGEST_STEP < cost(tokenizer, sample) <= length
        assert sample.meta["prompt_tokens"] == cost(tokenizer, sample) - sample.max_new_tokens
        assert sample.answers
        for answer in sample.answers:
            assert all(part in sample.prompt for part in answer.split(","))
        assert task.score(f" {', '.join(sample.answers)}.", sample)[task.metric] == 1
        assert task.score("", sample)[task.metric] == 0


@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SOME)
def test_no_sample_exceeds_its_length(byte_tokenizer, name, step):
    task = get_task(name)
    for length in range(8192, 8292, step):
        assert cost(byte_tokenizer, task.sample(byte_tokenizer, length, 0, 1)) <= length


@pytest.mark.parametrize("name", NAMES)
def test_samples_differ_and_do_not_depend_on_their_order(byte_tokenizer, name):
    keys = [(seed, index) for seed in (0, 1) for index in (0, 1, 2)]
    length = 2600
    task = get_task(name)
    samples = {key: task.sample(byte_tokenizer, length, *key) for key in keys}
    again = {key: get_task(name).sample(byte_tokenizer, length, *key) for key in reversed(keys)}
    assert samples == again
    assert len({sample.prompt for sample in samples.values()}) == len(keys)


@pytest.mark.slow
def test_another_process_draws_the_same_samples(byte_tokenizer):
    code = (
        "import sys, hashlib\n"
        "from lucid_jax.data import load_tokenizer\n"
        "from lucid_jax.evaluate.tasks import get_task\n"
        "tokenizer = load_tokenizer('bytes')\n"
        "for name in sys.argv[1:]:\n"
        "    prompt = get_task(name).sample(tokenizer, 2048, 3, 5).prompt\n"
        "    print(hashlib.sha256(prompt.encode()).hexdigest())\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *SOME],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    samples = [get_task(name).sample(byte_tokenizer, 2048, 3, 5) for name in SOME]
    assert out == [hashlib.sha256(s.prompt.encode()).hexdigest() for s in samples]


def test_samples_of_128k_tokens_take_few_tries(byte_tokenizer):
    """Growing a prompt word by word would take minutes."""
    for name in SOME:
        sample = get_task(name).sample(byte_tokenizer, 131072, 0, 0)
        assert 0.99 * 131072 <= cost(byte_tokenizer, sample) <= 131072


def test_names_in_results_mark_generated_prose():
    assert get_task("ruler_vt").name == "ruler_vt"
    assert get_task("ruler_niah_single_1").name == "ruler_niah_single_1"
    for name in ("ruler_niah_single_2", "ruler_niah_q10", "ruler_qa_2", "babilong_qa10"):
        assert get_task(name).name == f"{name}[prose]"


def test_all_tasks_of_the_benchmarks_exist():
    names = task_names()
    assert len(set(names)) == len(names)
    count = {prefix: sum(n.startswith(prefix) for n in names) for prefix in
             ("ruler_", "babilong_", "longbench_", "scrolls_")}  # fmt: skip
    assert count == {"ruler_": 13 + 15, "babilong_": 10, "longbench_": 16, "scrolls_": 7}


_TASK_ERRORS = {
    "unknown": ("no task 'ruler_niah_multikey'; the closest is 'ruler_niah_multi",
                "ruler_niah_multikey", {}),
    "prefix": ("no task 'qa1'; the closest is", "qa1", {}),
    "longbench": ("longbench_qasper needs the path", "longbench_qasper", {}),
    "scrolls": ("scrolls_qmsum needs the path", "scrolls_qmsum", {}),
    "folder": ("no folder '/absent'", "longbench_qasper", {"longbench": "/absent"}),
    "squad": (r"cannot read SQuAD 2\.0's JSON from '/absent\.json': FileNotFound", "ruler_qa_1",
              {"squad": "/absent.json"}),
    "hotpotqa": ("cannot read HotpotQA's JSON from '/absent.json'", "ruler_qa_2",
                 {"hotpotqa": "/absent.json"}),
    "books": ("no such file.*'/absent'", "babilong_qa1", {"books": "/absent/"}),
    "tokens": ("holds tokens, but a haystack needs text", "babilong_qa1",
               {"books": "arrayrecord:/absent"}),
}  # fmt: skip


@pytest.mark.parametrize(("message", "name", "paths"), _TASK_ERRORS.values(), ids=_TASK_ERRORS)
def test_unknown_tasks_and_unreadable_sources_are_refused(message, name, paths):
    with pytest.raises(ConfigError, match=message):
        get_task(name, Sources(**paths))


@pytest.mark.parametrize(
    ("message", "name", "length", "index"),
    [
        (r"ruler_vt does not fit in 200 tokens: this sample takes at least \d+ for the prompt and"
         " 30 for the answer", "ruler_vt", 200, 0),
        *((f"{name}.* does not fit in 100 tokens", name, 100, 0) for name in SOME),
        ("ruler_vt has no sample -1; it has any", "ruler_vt", 4096, -1),
        (r"ruler_qa_1\[prose\] has no sample 576; it has 576", "ruler_qa_1", 4096, 576),
    ],
)  # fmt: skip
def test_impossible_samples_are_refused(message, name, length, index):
    with pytest.raises(ConfigError, match=message):
        get_task(name).sample(load_tokenizer("bytes"), length, 0, index)


def test_essays_without_a_word_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"no text in .*empty\.txt"):
        get_task("ruler_niah_k2", Sources(essays=f"{tmp_path}/empty.txt"))
