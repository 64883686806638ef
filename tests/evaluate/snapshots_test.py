"""LongBench and SCROLLS, read from small folders with the layout of their snapshots."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lucid_jax.config import ConfigError
from lucid_jax.evaluate.tasks import Sources, get_task
from lucid_jax.evaluate.tasks.longbench import SPECS

# The hash of lm-eval 0.4.13's prompt with {context} and {question}, answer tokens, and metric.
_LONGBENCH = {
    "narrativeqa": ("895d1f65cf2d1af9", 128, "f1"),
    "qasper": ("83d3acdfc4174089", 128, "f1"),
    "multifieldqa_en": ("727131e8634ce44a", 64, "f1"),
    "hotpotqa": ("6960a0ee35afd3f4", 32, "f1"),
    "2wikimqa": ("6960a0ee35afd3f4", 32, "f1"),
    "musique": ("6960a0ee35afd3f4", 32, "f1"),
    "gov_report": ("91c25d585b189ced", 512, "rouge_l"),
    "qmsum": ("c8ef04690626b989", 512, "rouge_l"),
    "multi_news": ("2af3f28c40b902e6", 512, "rouge_l"),
    "trec": ("65983956537c7466", 64, "accuracy"),
    "triviaqa": ("aea16f8d28d6c3eb", 32, "f1"),
    "samsum": ("995217d78ece3f5f", 128, "rouge_l"),
    "passage_count": ("83490e925aae29c6", 32, "accuracy"),
    "passage_retrieval_en": ("ed4d8abd540fe8f7", 32, "accuracy"),
    "lcc": ("c9b204eb25250a70", 64, "edit_similarity"),
    "repobench-p": ("a475e8b81092a672", 64, "edit_similarity"),
}


@pytest.mark.parametrize("name", _LONGBENCH)
def test_longbench_prompts_are_verbatim(name):
    digest, new_tokens, metric = _LONGBENCH[name]
    spec = SPECS[name]
    assert hashlib.sha256(spec.template.encode()).hexdigest()[:16] == digest
    assert (spec.max_new_tokens, spec.metric) == (new_tokens, metric)


def write_jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def longbench_row(**changes):
    row = {"input": "Who?", "context": "Ann is here.", "answers": ["Ann"], "all_classes": None}
    return {**row, **changes}


def longbench(tmp_path, name, *rows):
    write_jsonl(tmp_path / "data" / f"{name}.jsonl", *rows)
    return get_task(f"longbench_{name}", Sources(longbench=str(tmp_path)))


def test_longbench_sample(tmp_path, byte_tokenizer):
    task = longbench(tmp_path, "multifieldqa_en", longbench_row(), longbench_row(input="Why?"))
    assert (task.name, task.size) == ("longbench_multifieldqa_en", 2)
    sample = task.sample(byte_tokenizer, 1024, 0, 1)
    assert sample.prompt == (
        "Read the following text and answer briefly.\n\nAnn is here.\n\nNow, answer the following"
        " question based on the above text, only give me the answer and do not output any other"
        " words.\n\nQuestion: Why?\nAnswer:"
    )
    assert sample.answers == ("Ann",)
    assert sample.meta == {"prompt_tokens": len(sample.prompt) + 1, "truncated_tokens": 0}
    assert task.score("Ann Bo", sample) == {"f1": pytest.approx(2 / 3)}
    with pytest.raises(ConfigError, match="longbench_multifieldqa_en has no sample 2; it has 2"):
        task.sample(byte_tokenizer, 1024, 0, 2)


def test_longbench_takes_the_best_answer(tmp_path, byte_tokenizer):
    task = longbench(tmp_path, "hotpotqa", longbench_row(answers=["Bo", "Ann"]))
    assert task.score("ann", task.sample(byte_tokenizer, 1024, 0, 0)) == {"f1": 1}


def test_longbench_scores_one_line_of_some_tasks(tmp_path, byte_tokenizer):
    row = longbench_row(answers=["City"], all_classes=["City", "Date"])
    task = longbench(tmp_path, "trec", row)
    sample = task.sample(byte_tokenizer, 1024, 0, 0)
    assert sample.stop == ("\n",)
    assert task.score("\nCity\nDate", sample) == {"accuracy": 1}
    assert task.score("City Date\n", sample) == {"accuracy": 0.5}


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_longbench_prompts_lose_their_middle(tmp_path, tokenizer, step):
    text = " ".join(f"line {i}." for i in range(400))
    task = longbench(tmp_path, "2wikimqa", longbench_row(context=f"{text} ünïcode"))
    whole = task.sample(tokenizer, 100_000, 0, 0)
    for length in range(600, 640, step):
        sample = task.sample(tokenizer, length, 0, 0)
        tokens = 1 + len(tokenizer.encode(sample.prompt))
        assert length - 8 <= tokens + sample.max_new_tokens <= length
        assert sample.meta["prompt_tokens"] == tokens
        assert sample.meta["truncated_tokens"] == whole.meta["prompt_tokens"] - tokens
        head = sample.prompt[:200]
        assert whole.prompt.startswith(head)
        assert sample.prompt.endswith(whole.prompt[-200:])


def test_a_letter_cut_in_half_does_not_exceed_the_length(tmp_path, byte_tokenizer):
    """Half of a two-byte letter decodes to U+FFFD, which has three bytes."""
    task = longbench(tmp_path, "2wikimqa", longbench_row(context="ü" * 1000))
    for length in range(800, 808):
        sample = task.sample(byte_tokenizer, length, 0, 0)
        assert sample.meta["prompt_tokens"] + sample.max_new_tokens <= length


def test_a_length_without_room_for_a_prompt_is_refused(tmp_path, byte_tokenizer):
    task = longbench(tmp_path, "2wikimqa", longbench_row())
    with pytest.raises(ConfigError, match="longbench_2wikimqa does not fit in 32 tokens"):
        task.sample(byte_tokenizer, 32, 0, 0)


def test_parquet_files_of_a_hub_snapshot(tmp_path, byte_tokenizer):
    row = longbench_row()
    row["question"] = row.pop("input")
    folder = tmp_path / "snapshots" / "abc" / "qasper"
    folder.mkdir(parents=True)
    for i in range(2):
        table = pa.Table.from_pylist([row | {"context": f"text {i}"}])
        pq.write_table(table, folder / f"test-0000{i}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist([row] * 3), folder / "train-00000-of-00001.parquet")
    task = get_task("longbench_qasper", Sources(longbench=str(tmp_path)))
    assert task.size == 2
    assert "Article: text 1\n" in task.sample(byte_tokenizer, 2048, 0, 1).prompt


def scrolls(tmp_path, name, *rows):
    rows = [{"id": str(i), "pid": "p", **row} for i, row in enumerate(rows)]
    write_jsonl(tmp_path / name / "validation.jsonl", *rows)
    write_jsonl(tmp_path / name / "train.jsonl", {"id": "train"})
    return get_task(f"scrolls_{name}", Sources(scrolls=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "text", "prompt", "new_tokens"),
    [
        ("qasper", "Who?\n\nAnn.\n\nBo.", "Ann.\n\nBo.\n\nQuestion: Who?\nAnswer:", 256),
        ("narrative_qa", "Who?\n\nAnn.", "Ann.\n\nQuestion: Who?\nAnswer:", 256),
        ("qmsum", "Sum up.\n\nAnn.", "Ann.\n\nQuestion: Sum up.\nAnswer:", 256),
        (
            "gov_report",
            "Ann.\n\nBo.",
            "Ann.\n\nBo.\n\nQuestion: What is a summary of the preceding text?\nAnswer:",
            1024,
        ),
        (
            "summ_screen_fd",
            "Ann.",
            "Ann.\n\nQuestion: What is a summary of the preceding text?\nAnswer:",
            256,
        ),
        (
            "contract_nli",
            "It holds.\n\nText.",
            "Text.\n\nHypothesis: It holds.\nConclusion:",
            256,
        ),
        (
            "quality",
            "Who?\n\n (A) Ann\n (B) Bo\n (C) Cy\n (D) Di\n\n\nText.\n\nMore.",
            "Text.\n\nMore.\n\nQuestion: Who?\n\n (A) Ann\n (B) Bo\n (C) Cy\n (D) Di\nAnswer:",
            256,
        ),
    ],
)
def test_scrolls_prompts_are_verbatim(tmp_path, byte_tokenizer, name, text, prompt, new_tokens):
    task = scrolls(tmp_path, name, {"input": text, "output": "x"})
    sample = task.sample(byte_tokenizer, 4096, 0, 0)
    assert sample.prompt == prompt
    assert (sample.max_new_tokens, sample.stop) == (new_tokens, ("\n",))
    assert sample.answers == ("x",)


def test_scrolls_rows_with_one_id_are_merged(tmp_path, byte_tokenizer):
    rows = [
        {"id": "a", "input": "Who?\n\nAnn.", "output": "Ann"},
        {"id": "b", "input": "Who?\n\nBo.", "output": "Bo"},
        {"id": "a", "input": "Who?\n\nAnn.", "output": "Unanswerable"},
    ]
    task = scrolls(tmp_path, "qasper", *rows)
    assert task.size == 2
    sample = task.sample(byte_tokenizer, 1024, 0, 0)
    assert sample.answers == ("Ann", "Unanswerable")
    assert task.score("ann", sample) == {"f1": 1}
    # An empty prediction counts as "Unanswerable".
    assert task.score(" \n", sample) == {"f1": 1}
    assert task.score("\n", task.sample(byte_tokenizer, 1024, 0, 1)) == {"f1": 0}


def test_scrolls_prompts_lose_their_beginning(tmp_path, byte_tokenizer):
    text = "Who?\n\n" + " ".join(f"line {i}." for i in range(400))
    task = scrolls(tmp_path, "narrative_qa", {"input": text, "output": "Ann"})
    whole = task.sample(byte_tokenizer, 100_000, 0, 0).prompt
    sample = task.sample(byte_tokenizer, 1024, 0, 0)
    assert sample.prompt == whole[-(1024 - 256 - 1) :]
    assert sample.meta["truncated_tokens"] == len(whole) - len(sample.prompt)


def test_scrolls_scores(tmp_path, byte_tokenizer):
    task = scrolls(tmp_path, "quality", {"input": "Who?\n\n(D) x\n\nText.", "output": "The cat!"})
    assert task.score("a cat", task.sample(byte_tokenizer, 1024, 0, 0)) == {"exact_match": 1}
    task = scrolls(tmp_path, "qmsum", {"input": "Who?\n\nText.", "output": "one two three"})
    sample = task.sample(byte_tokenizer, 1024, 0, 0)
    scores = [task.score("one two three", sample), task.score("three two x", sample)]
    assert scores[1] == pytest.approx({"rouge1": 2 / 3, "rouge2": 0, "rougeL": 1 / 3})
    # As in SCROLLS, each ROUGE is averaged first.
    means = task.aggregate(scores)
    assert means["rouge"] == pytest.approx((5 / 6 * 1 / 2 * 2 / 3) ** (1 / 3))
    assert task.metric == "rouge"


_FOLDER_ERRORS = {
    "nothing": ("no qasper.jsonl, qasper/test.*.jsonl or qasper/test.*.parquet below", "x", b""),
    "empty": ("no rows in .*qasper.jsonl", "qasper.jsonl", b""),
    "json": ("cannot read .*qasper.jsonl: ", "qasper.jsonl", b"{"),
    "parquet": (r"cannot read .*test\.parquet: ", "qasper/test.parquet", b"PAR1"),
}


@pytest.mark.parametrize(
    ("message", "file", "content"), _FOLDER_ERRORS.values(), ids=_FOLDER_ERRORS
)
def test_folders_without_readable_rows_are_refused(tmp_path, message, file, content):
    (tmp_path / "qasper").mkdir()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        get_task("longbench_qasper", Sources(longbench=str(tmp_path)))


def test_missing_columns_are_refused(tmp_path, byte_tokenizer):
    task = longbench(tmp_path, "qasper", {"context": "x", "answers": []})
    with pytest.raises(
        ConfigError, match="no column 'input' or 'question'; there are context, answers"
    ):
        task.sample(byte_tokenizer, 4096, 0, 0)
