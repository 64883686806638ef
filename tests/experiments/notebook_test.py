"""Notebooks name what is there, hold no outputs, and run from top to bottom."""

import ast
import importlib
import json
import os
import subprocess
import sys

import pytest
import toy

QUICKSTART = toy.ROOT / "experiments" / "colab" / "lucid_quickstart.ipynb"
NOTEBOOKS = sorted((toy.ROOT / "experiments").rglob("*.ipynb"))


def code_of(path) -> str:
    """The code of all cells in a row, without the lines for IPython."""
    cells = [x for x in json.loads(path.read_text())["cells"] if x["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    lines = "\n".join("".join(cell["source"]) for cell in cells).split("\n")
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_what_is_there(path):
    for node in ast.walk(ast.parse(code_of(path))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path):
    # At its end it says what a reader sees in its pictures and tables.
    check = "\nimport json; print(json.dumps([shares, result.finished, result.report.loss]))"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # As a reader compiles it.
        "XLA_FLAGS": "",
        "PYTHONPATH": str(toy.ROOT),
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        [sys.executable, "-c", code_of(QUICKSTART) + check],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shares, finished, loss = json.loads(done.stdout.splitlines()[-1])
    assert shares["lucid_attention"] > 1.3 * shares["softmax_attention"]
    assert finished
    assert loss < 3.3, "no better than the best unigram model"
    assert "def solve(" in done.stdout
    assert "| ruler_niah_single_1 | 600 |" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "tasks" / "scores.png").exists()
