"""The study of extrapolation: its sequences, its command at a toy size, and its report."""

import itertools
import json
import re

import jax
import numpy as np
import pytest

from experiments.extrapolation import stories, study
from experiments.extrapolation.stories import Stories
from experiments.retrieval import study as retrieval_study
from experiments.retrieval.runs import Group, Stage
from lucid_jax.evaluate.tasks.prose import SENTENCES, sentences

pytestmark = pytest.mark.usefixtures("compilation_cache")
TASK = Stories(96, shortest=48, cases=(1, 4), count=50)


def draw(task, count, *case):
    """Returns tokens and answers as numpy arrays."""
    run = jax.jit(lambda key: task.draw(key, count, *case))
    return jax.tree.map(np.asarray, run(jax.random.key(0)))


def test_a_sequence_is_a_story_in_prose_with_its_answer():
    text, answers = draw(TASK, 400, 1)
    assert text.shape == answers.shape == (400, 97)
    assert answers.argmax(1).tolist() == [96] * 400  # Full lengths.
    spaced = {" ".join(re.findall(r"\w+|[^\w\s]", x)) for x in sentences(SENTENCES)}
    fact = (
        r"(John|Mary|Sandra|Daniel) (?:went|went back|moved|travelled|journeyed) to the (\w+) \. "
    )
    before = []
    for tokens in text:
        told = stories.decode(tokens)
        prose, person, answer = re.fullmatch(
            r"<s> (.*)Where is (\w+) \? (\w+)", re.sub(fact, "", told)
        ).groups()
        # The last fact about a person says where the person is.
        assert dict(re.findall(fact, told))[person] == answer
        *whole, cut = re.split(r"(?<= \.) ", prose)
        assert whole
        assert spaced.issuperset(whole)
        assert any(x.startswith(cut.strip()) for x in spaced)
        parts = [len(re.sub(fact, "", told[: x.start()])) for x in re.finditer(fact, told)]
        before.append(np.mean(parts) / len(prose))
    # Places are uniform: half of the prose comes before a fact on average, up to 5 deviations of
    # the mean, where one sequence deviates by at most 1/2.
    assert abs(np.mean(before) - 0.5) < 5 * 0.5 / len(text) ** 0.5


def test_training_has_all_lengths_and_weighs_answers():
    text, answers = draw(TASK, 200)
    ends = answers.argmax(1)
    assert answers.sum(1).tolist() == [1] * 200
    assert ends.min() in range(48, 53)
    assert ends.max() in range(92, 97)
    after = np.arange(97) > ends[:, None]
    assert (text[after] == 0).all()
    assert (text[~after] > 0).all()
    weights = np.asarray(TASK.batch(text, answers)["weights"])
    assert (weights[answers[:, 1:]] == 1).all()
    others = np.where(text[:, 1:] > 0, 1 / 96, 0)[~answers[:, 1:]]
    assert weights[~answers[:, 1:]] == pytest.approx(others)


def test_every_variant_has_a_configuration_in_every_setting():
    found = set()
    for setting, variant in itertools.product(study.STAGES, study.VARIANTS):
        group = study.make_group(setting, variant, (0,))
        for stage in group.stages:
            model = group.config(stage).model
            found.add((model.attention, model.positions))
            assert stage.steps % group.chunk == 0
    assert len(found) == len(study.VARIANTS)


def record(setting, attention, positions, seed, accuracies, cases):
    """Returns a record as the study writes it, with the same accuracy in all cases."""
    evaluation = {n: {str(case): x for case in cases} for n, x in accuracies.items()}
    curve = {"step": [50], "seconds": [1.0], "accuracy": [0.5]}
    return {
        "setting": setting, "attention": attention, "temperature": 1.0, "positions": positions,
        "learning_rate": 1e-3, "seed": seed, "cases": cases, "finished": True, "curve": curve,
        "evaluation": evaluation,
    }  # fmt: skip


def test_the_report_has_a_line_for_every_variant(tmp_path, capsys):
    for seed, last in enumerate((0.25, 0.5)):
        found = {"2048": 1.0, "4096": last}
        records = [
            record("babilong", "softmax", "path", seed, found, [1, 2, 3, 4, 5]),
            record("babilong", "lucid", "none", seed, {"2048": 0.75}, [1, 2, 3, 4, 5]),
            record("2of6", "lucid", "rope", seed, {"256": 1.0, "512": 0.125}, [32]),
        ]
        values = {"environment": {}, "records": records}
        (tmp_path / f"study_{seed}.json").write_text(json.dumps(values))
    study.main(["--report", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert "| `babilong` | softmax, PaTH | 1.000 | 0.375 (0.250–0.500) |" in printed
    assert "| `babilong` | lucid, NoPE | 0.750 | – |" in printed
    assert "| `2of6` | lucid | 1.000 | 0.125 |" in printed
    assert "| softmax, PaTH | 4096 | 0.375 | 0.375 |" in printed
    assert "| most frequent answer | any | 0.194 |" in printed
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_variant_trains_and_is_evaluated_at_longer_lengths(tmp_path, monkeypatch):
    def toy_group(setting, variant, seeds):
        model = (
            ("vocab_size", stories.VOCAB_SIZE), ("num_layers", 1), ("embed_dim", 16),
            ("mlp_dim", 32), ("num_heads", 2), ("num_kv_heads", 1), ("head_dim", 8),
            ("compute_dtype", "float32"),
        )  # fmt: skip
        attention, positions = study.VARIANTS[variant]
        stages = (Stage(TASK, 4, 4),)
        return Group(
            setting, attention, stages, (1e-3,), seeds, positions=positions, model=model, chunk=2
        )

    monkeypatch.setattr(study, "make_group", toy_group)
    monkeypatch.setattr(retrieval_study, "_EVAL_TOKENS", 96)
    monkeypatch.setattr(retrieval_study, "_EVAL_SEQUENCES", 16)
    monkeypatch.setattr(retrieval_study, "_EVAL_FACTORS", (1, 2))
    study.main(["--setting=babilong", "--variant=lucid-path", "--seeds=0,1", f"--out={tmp_path}"])
    study.main(["--report", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "study.json").read_text())["records"]
    assert [(x["seed"], x["positions"], x["cases"]) for x in found] == [
        (seed, "path", [1, 4]) for seed in (0, 1)
    ]
    for x in found:
        assert x["curve"]["step"] == [2, 4]
        assert {n: set(cases) for n, cases in x["evaluation"].items()} == {
            "96": {"1", "4"}, "192": {"1", "4"},
        }  # fmt: skip
