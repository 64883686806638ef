"""Measurements in processes of their own, which compile side by side and run one by one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# Processes that compile at once; each keeps some memory of the GPUs meanwhile.
_AT_ONCE = max(1, min(16, 3 * (os.cpu_count() or 1) // 8))


def share_gpus() -> None:
    """Lets this process, if it has not used a GPU yet, and its children share their memory."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def measure_apart(module: str, runs: Sequence[object], *flags: str) -> Iterator[Any]:
    """Yields the last line that `python -m module --run=RUN` prints for each run, from JSON.

    Args:
      module: A command that calls `report_and_wait` between compiling and measuring.
      runs: What it takes, in JSON.
      flags: More of its flags.

    Raises:
      subprocess.CalledProcessError: a process that failed.
    """
    share_gpus()
    for first in range(0, len(runs), _AT_ONCE):
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, f"--run={json.dumps(run)}", *flags],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for run in runs[first : first + _AT_ONCE]
        ]  # fmt: skip
        try:
            for process in processes:
                assert process.stdout
                process.stdout.readline()  # It has compiled, or failed.
            for process in processes:
                printed, _ = process.communicate("\n")
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, process.args)
                yield json.loads(printed.splitlines()[-1])
        finally:
            for process in processes:
                process.kill()


def report_and_wait() -> None:
    """Says that everything is compiled, and waits until the device is free."""
    print("compiled", flush=True)
    sys.stdin.readline()
