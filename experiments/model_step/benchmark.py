"""Training steps of the 1B model on one GPU, LUCID beside softmax: speed, utilisation, memory.

  python -m experiments.model_step.benchmark

Whole steps at full size: forward, backward, AdamW, on random sequences of one document each. Every
measurement is a process of its own, which measures its own peak of memory. Needs a GPU of 80 GB,
takes about 4 minutes, and writes benchmark.json and benchmark.png.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments import measuring, reporting
from experiments.activations import build_model
from lucid_jax.config import Config
from lucid_jax.training.flops import flops_per_token, peak_flops
from lucid_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Run:
    """One model at one length."""

    config: str  # Name of a file under `configs/`, and its size after a colon.
    length: int  # Tokens of a sequence.
    batch: int  # Sequences of a step, all in one micro-batch.
    remat: str  # As in the configuration.
    steps: int  # Number of steps to time.


# Batches and rematerialisation that fit 80 GB; try others with `--run`.
RUNS = tuple(
    Run(config, *setting)
    for setting in ((2048, 16, "dots", 10), (32768, 1, "dots", 5), (131072, 1, "attention", 1))
    for config in ("softmax_1b", "lucid_1b")
)


def measure(run: Run) -> dict:
    """Returns a record of time and memory, measured in this process."""
    name, _, size = run.config.partition(":")
    values = importlib.import_module(f"configs.{name}").get_config(size or "full")
    values.batch_size = run.batch
    values.model.remat = run.remat
    # Without segment ids softmax attention can use the fastest kernel.
    values.data.update(sequence_length=run.length, packing="document")
    config = Config.from_dict(values.to_dict())
    trainer = Trainer.build(config, build_model(config))
    state = trainer.init_state()
    shape = run.batch, run.length
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size, jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, 1),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(run.length, dtype=jnp.int32), shape),
        "weights": jnp.ones(shape, jnp.float32),
    }
    step = trainer.make_step().lower(state, batch).compile()
    times = []
    for _ in range(run.steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - start)
    if not jnp.isfinite(loss):
        raise measuring.GateError(f"{run}: the loss is {loss}")
    seconds = statistics.median(times[1:])
    rate = run.batch * run.length / seconds
    device = jax.devices()[0]
    return dataclasses.asdict(run) | {
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token(config.model, run.length) / peak_flops(device),
        # CPUs report no memory.
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "environment": measuring.environment(("flax", "optax")),
    }


def measure_alone(run: Run) -> dict:
    """Calls `measure` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--run", json.dumps(dataclasses.asdict(run))]
    # All of the device's memory, as a training run would have.
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table, with LUCID's overhead over softmax."""
    softmax = {x["length"]: x for x in records if x["config"].startswith("softmax")}
    rows = []
    for x in records:
        other = softmax[x["length"]]
        overhead = other["tokens_per_second"] / x["tokens_per_second"] - 1
        rows.append(
            (
                f"{x['batch']} × {x['length']}", x["remat"], f"`{x['config']}`",
                f"{x['step_seconds']:.3f} s", f"{x['tokens_per_second']:,.0f}", f"{x['mfu']:.1%}",
                f"{x['peak_bytes'] / 1e9:.1f} GB", "" if x is other else f"{overhead:.1%}",
            )
        )  # fmt: skip
    header = (
        "sequences × tokens", "remat", "model", "step", "tokens/s", "MFU", "peak memory",
        "overhead",
    )  # fmt: skip
    return reporting.markdown(header, rows)


def plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots tokens a second and utilisation against length."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, label in (("softmax_1b", "softmax"), ("lucid_1b", "LUCID")):
        mine = [x for x in records if x["config"] == name]
        lengths = [x["length"] for x in mine]
        axes[0].plot(lengths, [x["tokens_per_second"] for x in mine], "o-", label=label)
        axes[1].plot(lengths, [x["mfu"] for x in mine], "o-", label=label)
    axes[0].set(ylabel="tokens a second", ylim=(0, None))
    axes[1].set(ylabel="model FLOPs utilisation", ylim=(0, 1))
    for ax in axes:
        ax.set(xlabel="tokens of a sequence", xscale="log", xticks=lengths, xticklabels=lengths)
        ax.minorticks_off()
        ax.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every run, prints the table, writes results and plot."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--run", type=json.loads, help="measure this alone: the fields of a Run")
    flags = parser.parse_args(argv)
    if flags.run is not None:
        print(json.dumps(measure(Run(**flags.run))))
        return
    records = [measure_alone(run) for run in RUNS]
    print(table(records))
    reporting.write_json(flags.out / "benchmark.json", command=flags.command, records=records)
    plot(records, flags.out / "benchmark.png")


if __name__ == "__main__":
    main()
