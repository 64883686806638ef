"""Everything that a first run on a TPU should show, in one command and one JSON file.

  python -m experiments.tpu_check

1. Conformance: every case of the Mosaic backend and of splash attention against the float64
   oracle, forward and every gradient, compiled for the chip (the slow tests too).
2. Benchmarks: `precondition` and `lucid_attention` by the kernels beside splash attention on
   the same inputs, after a gate of their own; times on the device, and memory.

Takes about 15 minutes on one chip and uses the first. The kernels have been compiled for
TPUs and interpreted on CPUs, but this project had none to run them on: the file written is
what we would like to see. It holds the chip, versions, results, and nothing of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from experiments.kernels import Backends, Shape, prepare, table
from experiments.measuring import GateError, environment

ROOT = pathlib.Path(__file__).parents[1]
BACKENDS = Backends("mosaic_tpu", "splash")
ROWS = (
    (Shape(8, 4096, 32, 4, 64), "lucid_attention", "forward+backward"),
    (Shape(1, 8192, 4, 4, 64), "precondition", "forward"),
    (Shape(1, 8192, 32, 4, 64), "lucid_attention", "forward"),
    (Shape(1, 8192, 32, 4, 64), "lucid_attention", "forward+backward"),
    (Shape(1, 32768, 32, 4, 64), "lucid_attention", "forward+backward"),
    (Shape(1, 32768, 16, 16, 128), "precondition", "forward+backward"),
    (Shape(1, 131072, 4, 4, 64), "precondition", "forward"),
    (Shape(1, 131072, 32, 4, 64), "lucid_attention", "forward+backward"),
)
_TESTS = ("tests/ops/mosaic_tpu_test.py", "tests/ops/attention_test.py")


def conformance() -> dict[str, object]:
    """Runs the tests in a process of their own, which gives the chip back when it ends."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory) / "report.xml"
        command = ["pytest", "-m", "slow or not slow", f"--junitxml={report}", *_TESTS]
        subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "tpu,cpu"},
            check=False,
        )
        suite = next(ElementTree.parse(report).iter("testsuite"))
    failures = {}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            if (problem := case.find(kind)) is not None:
                failures[f"{case.get('classname')}.{case.get('name')}"] = problem.get("message")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return counts | {"seconds": float(suite.get("time", 0)), "failed": failures}


def benchmarks(seconds: float) -> list[dict]:
    """A record for each row; where one is wrong or does not fit, what was said."""
    import jax

    records = []
    for shape, name, passes in ROWS:
        try:
            records.append(prepare(BACKENDS, shape, name, passes)(seconds))
            print(table(records[-1:], BACKENDS.softmax).splitlines()[-1], flush=True)
        except (GateError, jax.errors.JaxRuntimeError) as error:
            said = str(error).splitlines()[0]
            records.append({"shape": str(shape), "op": name, "pass": passes, "error": said})
            print(f"{shape}, {name}, {passes}: {said}", flush=True)
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both parts, prints the table and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5, help="of timing, a row")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tpu_check.json"))
    flags = parser.parse_args(argv)
    # Other processes first: once this one has the chip, no other can.
    backend = subprocess.check_output(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], text=True
    ).strip()
    if backend != "tpu":
        parser.error(f"it needs a TPU; the default backend is {backend}")
    tested = conformance()
    records = benchmarks(flags.seconds)
    print(table([x for x in records if "error" not in x], BACKENDS.softmax))
    result = {
        "command": "python -m experiments.tpu_check",
        "environment": environment(("libtpu",)),
        "conformance": tested,
        "dtype": "bfloat16",
        "benchmarks": records,
    }
    flags.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{tested['tests']} tests, {tested['failures']} failures, {tested['errors']} errors;"
        f" everything is in {flags.out}"
    )


if __name__ == "__main__":
    main()
