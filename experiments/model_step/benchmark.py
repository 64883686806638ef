"""Training steps of the 1B model on GPUs, LUCID beside softmax: speed, utilisation, memory.

  python -m experiments.model_step.benchmark [--gpus 1 2 4]

Whole steps at full size: forward, backward, AdamW, with default flags but for rematerialisation,
on random sequences of one document each and of packed documents. Several GPUs share the
parameters at 2048 tokens (fsdp) and the sequence from 32768 on (context). Every measurement is a
process of its own, which measures its own peak of memory; a few compile at once, and then they
run one by one. Needs GPUs of 80 GB and takes 3 to 6 minutes for one or two of them, 10 for four.
Writes benchmark.json, where it replaces the records of these numbers of GPUs, and benchmark.png.
"""

import dataclasses
import importlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import apart, kernels, measuring, reporting
from lucid_jax.config import Config
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.training.flops import model_flops, peak_flops
from lucid_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Run:
    """One model on sequences of one kind."""

    config: str  # Name of a file under `configs/`, and its size after a colon.
    length: int  # Tokens of a sequence.
    batch: int  # Sequences of a step for each GPU, or in all where the GPUs share a sequence.
    documents: int  # Mean length of packed documents; 0 for one document a sequence.
    gpus: int
    remat: str  # As in the configuration.
    steps: int  # Number of steps to time.
    telemetry: bool = True

    @property
    def axis(self) -> str:
        """The mesh axis of the GPUs."""
        return "fsdp" if self.length <= 2048 else "context"


def runs(gpus: int) -> list[Run]:
    """Returns the runs on so many GPUs; batches and rematerialisation fit 80 GB each."""
    settings = [
        (2048, 16, 0, gpus, "dots", 10),
        (2048, 16, 600, gpus, "dots", 10),
        (32768, 1, 0, gpus, "dots", 5),
        (32768, 1, 4000, gpus, "dots", 5),
        (131072, 1, 0, gpus, "attention", 1),
        (131072, 1, 4000, gpus, "attention", 2),
    ]
    if gpus == 4:
        settings += [
            (131072, 1, 29000, gpus, "attention", 2),
            (524288, 1, 16000, gpus, "full", 1),
            (1048576, 1, 16000, gpus, "full", 1),
            (524288, 1, 0, gpus, "full", 1),
        ]
    found = []
    for setting in settings:
        found += [Run(f"{kind}_1b", *setting) for kind in ("softmax", "lucid")]
        if setting[:3] in ((2048, 16, 0), (131072, 1, 4000)):
            found.append(Run("lucid_1b", *setting, telemetry=False))
    return found


def draw_batch(config: Config, documents: int) -> dict[str, np.ndarray]:
    """Draws random tokens in documents of this mean length, or one document a sequence."""
    b, s = shape = config.batch_size, config.data.sequence_length
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
    ids = kernels.draw_segments(b, s, documents) if documents else np.ones(shape, np.int32)
    starts = np.diff(ids, axis=1, prepend=0) != 0
    place = np.arange(s, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "segment_ids": ids,
        "positions": place - np.maximum.accumulate(np.where(starts, place, 0), 1),
        "weights": np.ones(shape, np.float32),
    }


def measure(run: Run, wait: Callable[[], object] = lambda: None) -> dict:
    """Returns a record of time and memory of this process; calls `wait` before the first step."""
    name, _, size = run.config.partition(":")
    values = importlib.import_module(f"configs.{name}").get_config(size or "full")
    values.batch_size = run.batch * (run.gpus if run.axis == "fsdp" else 1)
    values.telemetry = run.telemetry
    values.model.remat = run.remat
    # Without segment ids softmax attention can use the fastest kernel.
    packing = "pack" if run.documents else "document"
    values.data.update(sequence_length=run.length, packing=packing)
    values.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "context": 1, run.axis: run.gpus})
    config = Config.from_dict(values.to_dict())
    layout = make_layout(config, jax.devices()[: run.gpus])
    trainer = Trainer.build(config, LanguageModel.build(config.model, layout))
    step = trainer.make_step().lower(trainer.abstract_state, trainer.abstract_batch).compile()
    wait()
    state = trainer.init_state()
    batch = layout.stripes(run.length).apply(draw_batch(config, run.documents))
    batch = jax.device_put(batch, layout.sharding("batch", "sequence"))
    times = []
    for _ in range(run.steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - start)
    if not jnp.isfinite(loss):
        raise measuring.GateError(f"{run}: the loss is {loss}")
    seconds = statistics.median(times[1:])
    tokens, pairs = float(metrics["tokens"]), float(metrics["pairs"])
    device = jax.devices()[0]
    rate = model_flops(config.model, tokens, pairs) / seconds
    return dataclasses.asdict(run) | {
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": rate / (run.gpus * peak_flops(device)),
        # CPUs report no memory.
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "environment": measuring.environment(("flax", "optax")),
    }


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table, with LUCID's overhead over softmax and the speed-up by GPUs."""

    def find(x: dict, **changes: object) -> dict | None:
        names = "config", "length", "documents", "gpus", "telemetry"
        wanted = {name: x[name] for name in names} | changes
        return next((y for y in records if wanted.items() <= y.items()), None)

    rows = []
    for x in records:
        softmax = find(x, config=x["config"].replace("lucid", "softmax"), telemetry=True)
        one = find(x, gpus=1)
        overhead = softmax and softmax["tokens_per_second"] / x["tokens_per_second"] - 1
        speedup = one and x["tokens_per_second"] / one["tokens_per_second"]
        rows.append(
            (
                x["gpus"], f"{x['batch']} × {x['length']}", x["documents"] or "one", x["remat"],
                f"`{x['config']}`{'' if x['telemetry'] else ', telemetry off'}",
                f"{x['step_seconds']:.3f} s", f"{x['tokens_per_second']:,.0f}", f"{x['mfu']:.1%}",
                f"{x['peak_bytes'] / 1e9:.1f} GB",
                "" if not softmax or x is softmax else f"{overhead:.1%}",
                "" if not one or x is one else f"{speedup:.2f}",
            )
        )  # fmt: skip
    header = (
        "GPUs", "sequences × tokens", "documents of", "remat", "model", "step", "tokens/s", "MFU",
        "peak memory", "overhead", "times one GPU",
    )  # fmt: skip
    return reporting.markdown(header, rows)


def plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots tokens a second and utilisation on one GPU against length, one document each."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, label in (("softmax_1b", "softmax"), ("lucid_1b", "LUCID")):
        mine = [
            x for x in records
            if x["config"] == name and x["gpus"] == 1 and x["telemetry"] and not x["documents"]
        ]  # fmt: skip
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
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of GPUs")
    flags = parser.parse_args(argv)
    if flags.run is not None:
        print(json.dumps(measure(Run(**flags.run), apart.report_and_wait)))
        return
    path = flags.out / "benchmark.json"
    records = json.loads(path.read_text())["records"] if path.exists() else []
    records = [x for x in records if x["gpus"] not in flags.gpus]
    wanted = [dataclasses.asdict(run) for gpus in flags.gpus for run in runs(gpus)]
    for record in apart.measure_apart(__spec__.name, wanted):
        records = sorted([*records, record], key=lambda x: x["gpus"])
        # A killed sweep leaves what it has measured.
        reporting.write_json(path, command=flags.command, records=records)
    print(table(records))
    plot(records, flags.out / "benchmark.png")


if __name__ == "__main__":
    main()
