"""Every kind of source: its documents, their order, and its errors."""

import gzip
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lucid_jax.config import ConfigError
from lucid_jax.data import files, jsonl
from lucid_jax.data.documents import Completion
from lucid_jax.data.sources import SourceSpec, open_source
from lucid_jax.data.tokenize import main


def _open(text, text_field="text"):
    return open_source(SourceSpec.parse(str(text)), text_field)


def _documents(source):
    return [source[i] for i in range(len(source))]


def _write_parquet(path, texts, rows_per_group=3):
    pq.write_table(pa.table({"body": texts, "n": range(len(texts))}), path, rows_per_group)


def test_a_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo é")
    assert _documents(_open(file)) == ["one\ntwo é"]


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


def test_a_jsonl_line_may_have_a_prompt_and_a_completion(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"completion": "b", "prompt": "a"}\n{"text": "t", "prompt": "", "completion": 0}'
    )
    assert _documents(_open(file)) == [Completion("a", "b"), "t"]


@pytest.mark.parametrize(
    "read_bytes", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 64))]
)
def test_jsonl_lines_that_span_several_reads(corpus, texts, monkeypatch, read_bytes):
    monkeypatch.setattr(jsonl, "_READ_BYTES", read_bytes)
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


def _compress(path, kind, content):
    with pa.output_stream(str(path), compression=kind) as stream:
        stream.write(content)


# Files of a folder, given without a kind, and its documents or the error.
_FOLDERS = {
    "jsonl": ({"a.jsonl": b'{"text": "a"}', "b/c.jsonl": b'{"text": "c"}'}, ["a", "c"]),
    "compressed": (
        {
            "a.jsonl.gz": b'{"text": "a"}\n{"text": "b"}',
            "b.jsonl": b'{"text": "c"}',
            "c.jsonl.zst": b'{"text": "d"}',
        },
        ["a", "b", "c", "d"],
    ),
    "text": ({"a.py": b"a", "bb": b"b", "c.md": b"c", "d.txt.gz": b"d"}, ["a", "b", "c", "d"]),
    "mixed": (
        {"a.jsonl": b'{"text": "a"}', "b.txt": b"b"},
        r"'[^']*/' holds files of several kinds: jsonl \(a.jsonl\), text \(b.txt\).*jsonl:/",
    ),
    "unknown": ({"a.jsonl": b'{"text": "a"}', "b.png": b"\x89PNG"}, r"text \(b.png\)"),
    "latin-1": ({"a.txt": "één".encode("latin-1")}, "a.txt is not text in UTF-8: byte 0 is 0xe9"),
    "binary": ({"a": b"a", "b.bin": b"ab\0c"}, "b.bin is not text but binary: byte 2 is 0"),
    "png": ({"a.png": b"\x89PNG"}, "a.png is not text in UTF-8: byte 0 is 0x89"),
    "second": (
        {"a.jsonl": b'{"text": "a"}', "b.jsonl": b'{"body": "a"}'},
        "b.jsonl, line 1: no column 'text'",
    ),
    "empty": ({}, "no visible files below the folder"),
}


@pytest.mark.parametrize(("files", "expected"), _FOLDERS.values(), ids=_FOLDERS)
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_is_of_the_kind_of_its_files(tmp_path, monkeypatch, files, expected, slash):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus" / "b").mkdir(parents=True)
    for name, content in files.items():
        kind = {".gz": "gzip", ".zst": "zstd"}.get(name[name.rfind(".") :])
        _compress(tmp_path / "corpus" / name, kind, content)
    if isinstance(expected, list):
        assert _documents(_open(f"{tmp_path}/corpus{slash}")) == expected
    elif slash:
        with pytest.raises(ConfigError, match=expected):
            _open(f"{tmp_path}/corpus/")


def test_a_folder_of_tokens_is_known_by_its_files(tmp_path, corpus):
    main([f"--input={corpus}", "--tokenizer=bytes", f"--output={tmp_path}/tokens"])
    assert SourceSpec.parse(f"{tmp_path}/tokens/").kind == "arrayrecord"


def test_a_compressed_file_is_decompressed_once_for_each_content(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a.jsonl.gz"
    # Two members, as parallel compressors write.
    file.write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'))
    assert _documents(_open(file)) == ["one", "two"]
    monkeypatch.setattr(files, "_open_compressed", None)
    assert _documents(_open(file)) == ["one", "two"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file.write_bytes(gzip.compress(b'{"text": "other"}\n'))
    assert _documents(_open(file)) == ["other"]
    file.write_bytes(file.read_bytes()[:-9])
    before = set((tmp_path / "cache").rglob("*"))
    with pytest.raises(ConfigError, match=r"a.jsonl.gz cannot be decompressed into .*Truncated"):
        _open(file)
    assert set((tmp_path / "cache").rglob("*")) == before


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
    "not-utf-8": ("latin.jsonl, line 1: byte 10 of the line is not UTF-8", "{}/latin.jsonl"),
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
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    _write_parquet(tmp_path / "a.pq", ["x"])
    pq.write_table(pa.table({"text": [1]}), tmp_path / "number.parquet")
    (tmp_path / "b.parquet").write_text("not Parquet")
    with pytest.raises(ConfigError, match=message):
        _open(source.format(tmp_path))
