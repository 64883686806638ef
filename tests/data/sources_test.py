"""Every kind of source: its documents, their order, and its errors."""

import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lucid_jax.config import ConfigError
from lucid_jax.data import sources
from lucid_jax.data.sources import SourceSpec, open_source


def _open(text, text_field="text"):
    return open_source(SourceSpec.parse(str(text)), text_field)


def _documents(source):
    return [source[i] for i in range(len(source))]


def _write_parquet(path, texts, rows_per_group=3):
    pq.write_table(pa.table({"body": texts, "n": range(len(texts))}), path, rows_per_group)


def test_a_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\ntwo \xff")
    assert _documents(_open(file)) == ["one\ntwo \ufffd"]


def test_a_text_folder_is_sorted_and_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.py", "a/y", ".hidden/x.txt", "a/.x.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert _documents(_open(f"text:{tmp_path}")) == ["a/y", "a/z.py", "b.txt", "c.md"]


def test_a_jsonl_line_is_one_document(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = ['{"text": "é\\n"}', "", '{"n": 1, "text": "two"}\r', "\r", '{"text": null}']
    blank = ["  ", "\t\t", " \r", '  {"text": "indented"}']
    file.write_text("\n".join([*lines, *blank, '{"text": "\\ud800 last"}']), newline="")
    assert _documents(_open(file)) == ["é\n", "two", "", "indented", "? last"]


@pytest.mark.parametrize(
    "read_bytes", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 64))]
)
def test_jsonl_lines_that_span_several_reads(corpus, texts, monkeypatch, read_bytes):
    monkeypatch.setattr(sources, "_READ_BYTES", read_bytes)
    assert _documents(_open(corpus)) == texts
    with open(corpus, "a") as file:
        file.write('\n{"body": "no text"}\n')
    with pytest.raises(ConfigError, match=r"corpus.jsonl, line 43: no column 'text'"):
        _documents(_open(corpus))


def test_a_damaged_parquet_file_is_a_one_line_error(tmp_path):
    file = tmp_path / "a.parquet"
    _write_parquet(file, ["x" * 100])
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a.parquet cannot be read as Parquet: [^\n]+$"):
        _open(file, "body")[0]


def test_a_changed_jsonl_file_is_read_anew(write_jsonl):
    path = write_jsonl("a.jsonl", ["one"])
    assert len(_open(path)) == 1
    assert _documents(_open(write_jsonl("a.jsonl", ["two", "three"]))) == ["two", "three"]


@pytest.mark.parametrize("pattern", ["jsonl:{}", "{}/*/*.jsonl", "{}/**/*.jsonl"])
def test_jsonl_folders_and_globs(tmp_path, write_jsonl, pattern):
    for part in ("b", "a"):
        (tmp_path / part).mkdir()
        write_jsonl(f"{part}/x.jsonl", [part + "0", part + "1"])
    (tmp_path / "a" / "readme.txt").write_text("not JSON")
    assert _documents(_open(pattern.format(tmp_path))) == ["a0", "a1", "b0", "b1"]


def test_parquet_row_groups_and_files(tmp_path):
    texts = [f"row {i}" for i in range(11)]
    _write_parquet(tmp_path / "0.parquet", texts[:7])
    _write_parquet(tmp_path / "1.parquet", texts[7:])
    assert _documents(_open(f"parquet:{tmp_path}", "body")) == texts


def test_python_stdlib_is_source_code_without_its_tests():
    source = _open("python-stdlib")
    documents = {source._files[i].name: i for i in range(len(source))}
    assert len(source) > 300
    assert "def dataclass(" in source[documents["dataclasses.py"]]
    parts = {part for file in source._files for part in file.parts}
    assert not parts & {"site-packages", "idlelib", "test", "__pycache__"}


def test_sources_can_be_pickled_and_read_by_threads(tmp_path, corpus, texts):
    _write_parquet(tmp_path / "a.parquet", texts)
    order = list(range(len(texts))) * 5
    random.Random(0).shuffle(order)
    for source in (_open(corpus), _open(tmp_path / "a.parquet", "body")):
        copy = pickle.loads(pickle.dumps(source))
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(copy.__getitem__, order)) == [texts[i] for i in order]


def test_an_explicit_kind_overrides_the_ending(corpus, texts):
    assert len(_open(f"text:{corpus}")) == 1
    assert len(_open(corpus)) == len(texts)


_ERRORS = {
    "file": ("no such file.*absent.jsonl", "{}/absent.jsonl"),
    "folder": ("no such file.*absent", "text:{}/absent"),
    "glob": (r"no such file.*\*.parquet", "{}/empty/*.parquet"),
    "folder-without": (r"no .parquet files below.*empty", "parquet:{}/empty"),
    "no-documents": ("jsonl source.*blank.jsonl.*no documents", "{}/blank.jsonl"),
    "kind": ("no known kind.*text, jsonl, parquet, arrayrecord", "csv:{}/a.csv"),
    "ending": ("no known kind", "{}/corpus"),
    "stdlib-path": ("no known kind", "python-stdlib:3.11"),
    "no-path": ("no known kind", "text:"),
    "jsonl-column": (
        r"column.jsonl, line 1: no column 'text'.*there are body, n",
        "{}/column.jsonl",
    ),
    "parquet-column": (r"a.pq: no column 'text'.*there are body, n", "parquet:{}/a.pq"),
    "parquet-number": (
        "number.parquet: column 'text' must hold strings; it holds int64",
        "{}/number.parquet",
    ),
    "parquet-broken": (r"b.parquet cannot be read as Parquet: Parquet magic", "{}/b.parquet"),
    "number": ("number.jsonl, line 1: the text must be a string; got int", "{}/number.jsonl"),
    "not-json": ("broken.jsonl, line 2: not a line of JSON", "{}/broken.jsonl"),
    "list": ("list.jsonl, line 1: not a JSON object", "{}/list.jsonl"),
    "no-metadata": ("metadata.json is missing", "arrayrecord:{}/a.pq"),
}


@pytest.mark.parametrize(("message", "source"), _ERRORS.values(), ids=_ERRORS)
def test_errors(tmp_path, message, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n  \n\t\n")
    (tmp_path / "column.jsonl").write_text('{"body": "x", "n": 1}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "broken.jsonl").write_text('\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    _write_parquet(tmp_path / "a.pq", ["x"])
    pq.write_table(pa.table({"text": [1]}), tmp_path / "number.parquet")
    (tmp_path / "b.parquet").write_text("not Parquet")
    with pytest.raises(ConfigError, match=message):
        _open(source.format(tmp_path))
