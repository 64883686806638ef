"""The experiments' pages: their commands, links and tables match the code and the results."""

import importlib
import json
import re
import shlex

import pytest
import toy

from experiments import kernels
from experiments.attention_noise import run as attention_noise
from experiments.conditioning import run as conditioning
from experiments.decode import benchmark as decode
from experiments.learnability import run as learnability
from experiments.model_step import benchmark as model_step
from experiments.real_model import corpus
from experiments.retrieval import report as retrieval
from experiments.sequence_scaling import simulate, two_gpus
from experiments.tpu_roofline import roofline
from experiments.triton_precondition import accuracy, packed
from experiments.xla_precondition import benchmark as xla_precondition

EXPERIMENTS = toy.ROOT / "experiments"
PAGES = sorted(EXPERIMENTS.rglob("*.md"))
TABLES = {
    "xla_precondition/results/benchmark.json": xla_precondition.table,
    "triton_precondition/results/benchmark.json": lambda x: kernels.table(x, "cuDNN"),
    "triton_precondition/results/packed.json": packed.table,
    "triton_precondition/results/accuracy.json": accuracy.table,
    "model_step/results/benchmark.json": model_step.table,
    "decode/results/benchmark.json": decode.table,
    "tpu_roofline/results/roofline.json": roofline.table,
    "sequence_scaling/results/simulation.json": simulate.table,
    "sequence_scaling/results/two_gpus.json": two_gpus.table,
    "conditioning/results/longer/random.json": conditioning.table,
    "attention_noise/results/attention_noise.json": attention_noise.table,
    "attention_noise/results/4of4/attention_noise.json": attention_noise.table,
    "real_model/results/corpus.json": corpus.table,
    "retrieval/results/study.json": retrieval.table,
    "retrieval/results/small/study.json": retrieval.by_length,
    "extrapolation/results/study.json": retrieval.by_length,
}


def commands(text):
    """Yields the documented commands as lists of arguments."""
    joined = text.replace("\\\n", " ")
    for line in re.findall(r"^ +(python -m experiments\..*)$|`(python -m experiments\.[^`]*)`",
                           joined, re.MULTILINE):  # fmt: skip
        yield shlex.split("".join(line), comments=True)


def test_documented_commands_know_their_flags(capsys):
    texts = [path.read_text() for path in (*PAGES, toy.ROOT / "README.md")]
    found = [command for text in texts for command in commands(text)]
    assert len(found) > 30
    for _, _, module, *arguments in found:
        with pytest.raises(SystemExit) as exited:
            importlib.import_module(module).main(["--help"])
        assert exited.value.code == 0
        known = capsys.readouterr().out
        for flag in arguments:
            assert flag.split("=")[0] in known, f"{module} {flag}"


def test_links_lead_somewhere():
    for path in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_committed_results(name):
    result = json.loads((EXPERIMENTS / name).read_text())
    records = result["stages"] if "stages" in result else result["records"]
    page = (EXPERIMENTS / name.split("/")[0] / "README.md").read_text()
    missing = set(TABLES[name](records).splitlines()) - set(page.splitlines())
    assert not missing


@pytest.mark.slow
def test_pictures_can_be_drawn_from_the_committed_results(tmp_path):
    result = json.loads((EXPERIMENTS / "learnability/results/learnability.json").read_text())
    steps = result["first_phase_steps"], result["steps_of_a_record"]
    page = (EXPERIMENTS / "learnability/README.md").read_text()
    assert learnability.table(result["runs"], *steps) in page
    learnability.plot(result["runs"], *steps, tmp_path / "picture.png")
    for name, module in (("model_step", model_step), ("xla_precondition", xla_precondition)):
        records = json.loads((EXPERIMENTS / name / "results/benchmark.json").read_text())["records"]
        module.plot(records, tmp_path / "picture.png")
