"""The paper's tables beside scores of toy models."""

import json

import numpy as np
import pytest
import toy
from echo import EchoGenerator

from experiments.activations import Trained
from experiments.paper_tables import run, training_data
from experiments.paper_tables.needle_attention import hit_rates
from experiments.paper_tables.paper import HIT_RATES, TABLES
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.evaluate import text_generator
from lucid_jax.evaluate.request import SEED
from lucid_jax.evaluate.tasks import get_task, task_names

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    toy.save_random(directory, toy.toy_config("", batch_size=24))
    return directory


@pytest.mark.parametrize("name", TABLES)
def test_every_number_of_the_paper_has_a_task_and_a_length(name):
    table = TABLES[name]
    assert {task for tasks in table.rows.values() for task in tasks} <= set(task_names())
    for rows in table.paper.values():
        assert rows.keys() <= table.rows.keys()
        assert {len(numbers) for numbers in rows.values()} == {len(table.lengths)}
        assert all(0 <= x <= 100 for numbers in rows.values() for x in numbers)


def test_four_needles_are_the_same_in_both_tables():
    """The paper's two tables of one measurement agree where they overlap, but for a rounding."""
    for model in HIT_RATES:
        by_needles = TABLES["needles"].paper[model]["4 needles"]
        by_length = TABLES["lengths"].paper[model]["MNIAH"][:4]
        np.testing.assert_allclose(by_needles, by_length, atol=0.21)


def test_a_table_has_the_papers_lines_and_ours(workdir, monkeypatch, tmp_path, capsys):
    toy.use_devices(monkeypatch, 1)
    monkeypatch.setattr(text_generator, "Generator", EchoGenerator())
    arguments = [f"--model=toy={workdir}", f"--out={tmp_path}", "--samples=4"]
    run.main(["--table=needles", "--lengths=2048", *arguments])
    printed = capsys.readouterr().out
    assert "| 2 needles | Standard (paper) | 57.0 |" in printed
    assert "| 10 needles | LUCID (paper) | 22.8 |" in printed
    assert "[prose]: ours are on generated text" in printed
    assert (tmp_path / "needles.md").read_text() in printed
    records = json.loads((tmp_path / "needles.json").read_text())["records"]
    assert [x["row"] for x in records] == list(TABLES["needles"].rows)
    scores = json.loads((workdir / "tasks" / "scores.json").read_text())["tasks"]
    for record, task in zip(records, scores, strict=True):
        score = task["scores"]["string_match_all"]["mean"]
        assert record["score"] == pytest.approx(100 * score)
        assert f"| {record['row']} | **toy** | {100 * score:.1f} |" in printed
    # The generator answers with the first needle, if it is odd, so more needles hide the right one.
    assert records[0]["score"] > 0

    # Scores on prose are in the same file as those on a text.
    text = tmp_path / "essay.txt"
    text.write_text("An essay of one sentence. " * 50)
    real = ["--table=needles", "--lengths=2048", *arguments, f"--sources=essays=text:{text}"]
    run.main(real)
    assert "[prose]" not in capsys.readouterr().out
    run.main(real[:-1])
    assert "[prose]" in capsys.readouterr().out

    run.main(["--table=babilong", "--lengths=8000", *arguments, "--samples=1"])
    [record] = json.loads((tmp_path / "babilong.json").read_text())["records"]
    assert record["samples"] == 5


def test_hit_rates_are_shares(workdir, tmp_path, capsys):
    run.main(["--table=hits", "--lengths=800", "--samples=2", f"--model=toy={workdir}",
              f"--out={tmp_path}"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "| LUCID (paper) | 0.2845 |" in printed
    [record] = json.loads((tmp_path / "hits.json").read_text())["records"]
    shares = [record[name] for name in run.LABELS]
    assert all(0 < x < 1 for x in shares)
    assert shares[0] > shares[2]


def test_uniform_attention_hits_in_proportion_to_the_answer(tmp_path):
    """Queries of zero attend to all tokens alike, of which seven are the answer."""
    config = toy.toy_config("", model={"attention": "softmax"})
    model = toy.model_of(config)
    params = model.init(seed=0)
    query = params["layers"]["attention"]["query"]
    query.set_value(0 * query.get_value())
    task, length = get_task("ruler_niah_single_1"), 700
    rates = hit_rates(Trained(config, model, params), task, length, 1)
    # The prompt and room for 128 new tokens fill the length, up to the slack of a sample.
    assert rates.mean_softmax == pytest.approx(7 / (length - 128), rel=0.15)
    assert len(set(np.round(rates, 7))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table=needles", "--model=runs/a"], "--model must be LABEL=WORKDIR; got 'runs/a'"),
        (["--table=hits", "--model=a=b", "--lengths=1,2"], "takes one of --lengths; got 2"),
        (["--table=needles", "--model=a=nowhere"], "no checkpoint in"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exited:
        run.main(arguments)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_training_data_are_samples_that_no_evaluation_has(tmp_path, capsys):
    path = tmp_path / "new" / "train.jsonl"
    arguments = [f"--output={path}", "--tasks=babilong_qa1,babilong_qa4", "--length=6000"]
    training_data.main([*arguments, "--indices=3:5"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["prompt"] for line in lines}) == 4
    places = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
    assert {line["completion"].removeprefix(" ") for line in lines} <= places
    evaluated = get_task("babilong_qa1").sample(load_tokenizer("bytes"), 6000, SEED, 3)
    assert evaluated.prompt not in {line["prompt"] for line in lines}
    data = {"train": str(path), "packing": "document", "sequence_length": 6000}
    check_data(toy.toy_config("", data={**data, "eval": ""}), load_tokenizer("bytes"))
    with pytest.raises(SystemExit):
        training_data.main([*arguments, "--indices=3"])
    with pytest.raises(SystemExit):
        training_data.main([*arguments, "--indices=0:1", "--sources=books=nowhere.txt"])
    assert "nowhere.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"attention": "differential"}, "a head of a differential layer has no probabilities"),
        ({"positions": "path"}, "has transitions or a learnt β, which this experiment does not"),
        ({"lucid_beta": True}, "has transitions or a learnt β, which this experiment does not"),
    ],
)
def test_models_without_a_hit_rate_are_refused(tmp_path, capsys, model, message):
    toy.save_random(tmp_path, toy.toy_config("", model=model))
    with pytest.raises(SystemExit):
        run.main(["--table=hits", f"--model=a={tmp_path}", f"--out={tmp_path}"])
    assert message in capsys.readouterr().err
