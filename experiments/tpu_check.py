"""A first run on a TPU, in one command and one JSON file.

  python -m experiments.tpu_check

1. Conformance: every case of the Mosaic backend and of splash attention against the float64
   oracle, forward and every gradient, compiled for the chip, slow tests included.
2. Benchmarks: `precondition` and `lucid_attention` by the kernels beside splash attention on
   the same inputs, after a check of their own: device times, and memory.

Takes about 15 minutes on one chip. The kernels have been compiled for TPUs and interpreted on CPUs,
but this project had no TPU to run them on: please send us the file. It holds the chip, the host's
processor, versions and results, and nothing else about the machine.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import jax

from experiments import reporting
from experiments.kernels import Backends, Shape, prepare, table
from experiments.measuring import GateError, provenance

ROOT = pathlib.Path(__file__).parents[1]
BACKENDS = Backends("mosaic_tpu", "splash")
BENCHMARKS = (
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
    """Runs the tests in another process, which frees the chip when it ends."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory) / "report.xml"
        command = ["pytest", "-m", "slow or not slow", f"--junitxml={report}", *_TESTS]
        devices = {**os.environ, "JAX_PLATFORMS": "tpu,cpu"}
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=devices, check=False)
        suite = next(ElementTree.parse(report).iter("testsuite"))
    failures = {}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            if (problem := case.find(kind)) is not None:
                failures[f"{case.get('classname')}.{case.get('name')}"] = problem.get("message")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return counts | {"seconds": float(suite.get("time", 0)), "failed": failures}


def benchmarks(seconds: float) -> list[dict]:
    """Returns a record of each benchmark, or its error where it is wrong or does not fit."""
    records = []
    for shape, name, passes in BENCHMARKS:
        try:
            records.append(prepare(BACKENDS, shape, name, passes)(seconds))
            print(table(records[-1:], BACKENDS.softmax).splitlines()[-1], flush=True)
        except (GateError, jax.errors.JaxRuntimeError) as error:
            message = str(error).splitlines()[0]
            records.append({"shape": str(shape), "op": name, "pass": passes, "error": message})
            print(f"{shape}, {name}, {passes}: {message}", flush=True)
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both parts, prints the table and writes the file."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--seconds", type=float, default=5, help="of timing for each benchmark")
    parser.set_defaults(out=pathlib.Path("tpu_check.json"))
    flags = parser.parse_args(argv)
    # Other processes run first, because only one process at a time can use the chip.
    backend = subprocess.check_output(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], text=True
    ).strip()
    if backend != "tpu":
        parser.error(f"it needs a TPU; the default backend is {backend}")
    tested = conformance()
    records = benchmarks(flags.seconds)
    print(table([x for x in records if "error" not in x], BACKENDS.softmax))
    header = provenance(flags, ("libtpu",))
    reporting.write_json(
        flags.out, **header, conformance=tested, dtype="bfloat16", benchmarks=records
    )
    print(
        f"{tested['tests']} tests, {tested['failures']} failures, {tested['errors']} errors;"
        f" everything is in {flags.out}"
    )


if __name__ == "__main__":
    main()
