"""The samples file: results survive a kill, and a line cut short is dropped."""

import dataclasses

import pytest

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.samples_file import Group, Result, SamplesFile

GROUP = Group("abc", "ruler_vt", 2048, 42)
RESULTS = [
    Result(0, 4, "a\nb ", ("1", "2"), {"s": 0.5}, {"prompt_tokens": 7}),
    Result(2, 4, left_out="too long"),
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "samples.jsonl"
    with SamplesFile(path) as file:
        file.add(GROUP, RESULTS)
    return path


def test_results_are_read_back_by_group(path):
    other = dataclasses.replace(GROUP, length=4096)
    with SamplesFile(path) as file:
        assert file.results(GROUP) == {0: RESULTS[0], 2: RESULTS[1]}
        assert file.results(other) == {}
        file.add(other, RESULTS[:1])
        assert file.results(other) == {0: RESULTS[0]}
    with SamplesFile(path) as file:
        assert (len(file.results(GROUP)), len(file.results(other))) == (2, 1)


def test_results_are_on_disk_before_the_file_is_closed(tmp_path):
    with SamplesFile(tmp_path / "x.jsonl") as file:
        file.add(GROUP, RESULTS)
        assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 2


def test_a_line_cut_short_is_dropped_wherever_it_is_cut(path):
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for size in range(first, len(content), 13):
        path.write_bytes(content[:size])
        with SamplesFile(path) as file:
            assert file.results(GROUP) == {0: RESULTS[0]}
            file.add(GROUP, RESULTS[1:])
        assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["no JSON", "[1]", "{}", '{"index": 1, "step": 2, "other": 3}'])
def test_other_lines_are_refused(path, line):
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=f"line 3 of {path} is not the result of a sample"):
        SamplesFile(path)
