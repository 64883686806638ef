"""Does an attention sink keep softmax from learning, and LUCID not? Both phases of the paper.

  python -m experiments.learnability.run
  python -m experiments.learnability.run --second=90000 --only=LUCID \
      --only='softmax, temperature 1' --out=experiments/learnability/results/longer

One layer learns to reproduce its token, then, from there, the running average of the tokens.
A step of the five seeds of a variant takes about 3 ms on 2 idle CPU cores, all of it 15 minutes.
Writes learnability.json and learnability.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import measuring
from experiments.learnability import layer, training

RESULTS = pathlib.Path(__file__).parent / "results"
# A loss that counts as learnt: under 1% of what the best function of the own token leaves.
LEARNT = 0.01
TOLERANCE = 1e-9  # in float64


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is trained; `first_phase` is False for a control that sees the second task alone."""

    kind: str
    temperature: float = 1.0
    first_phase: bool = True

    def __str__(self) -> str:
        if self.kind == "lucid":
            return "LUCID"
        name = f"softmax, temperature {self.temperature:g}"
        return name if self.first_phase else f"{name}, second phase alone"


VARIANTS = (
    Variant("lucid"),
    *(Variant("softmax", temperature) for temperature in (0.5, 1.0, 2.0, 4.0)),
    Variant("softmax", first_phase=False),
)


def own_token_loss() -> float:
    """The least loss in the second phase of any function of the own token alone.

    That is what a layer can reach that attends to nothing but its own token. The average at
    position `i` is `(x + sum of i − 1 others)/i`; the others are drawn without replacement.
    """
    number = np.arange(layer.TOKENS)
    position = np.arange(1, layer.TOKENS + 1)[:, None]
    others = layer.TOKENS - 1
    mean = (number.sum() - number) / others
    variance = ((number**2).sum() - number**2) / others - mean**2
    expected = (number + (position - 1) * mean) / position
    drawn = (position - 1) * (others - (position - 1)) / (others - 1)
    spread = drawn * variance / position**2
    return float((spread + (expected - expected.mean(0)) ** 2).mean())


def check(params: dict[str, jax.Array], variant: Variant) -> float:
    """Holds the layer by token to the library's ops, in float64, outputs and gradients.

    Raises:
      GateError: they differ, so that what was trained is not the library's attention.
    """
    with jax.enable_x64(True):
        double = {name: jnp.asarray(x, jnp.float64) for name, x in params.items()}
        temperature = jnp.asarray(variant.temperature, jnp.float64)
        error = float(training.disagreement(double, variant.kind, temperature, 0))
    if not error <= TOLERANCE:
        raise measuring.GateError(
            f"{variant}: the layer by token differs from the library's ops by {error:.1e},"
            f" expected at most {TOLERANCE:.0e}"
        )
    return error


def run(variant: Variant, seeds: int, first: int, second: int, every: int) -> dict:
    """Trains the variant with every seed; its records `[N,windows]` and what became of it."""
    first = first if variant.first_phase else 0
    params, records = training.train(
        variant.kind, variant.temperature, jnp.arange(seeds), first, first + second, every
    )
    error = check(params, variant)
    records = {name: np.asarray(x, np.float64) for name, x in records.items()}
    return {
        "variant": str(variant),
        **dataclasses.asdict(variant),
        "disagreement_with_ops": error,
        "summary": summarise(records, first // every, every),
        "records": records,
    }


def summarise(records: dict[str, np.ndarray], boundary: int, every: int) -> dict:
    """Last windows of both phases, and when each seed had learnt the second task."""
    learnt = records["loss"][:, boundary:] < LEARNT
    last = {name: x[:, boundary - 1] for name, x in records.items()} if boundary else None
    return {
        "first_phase": last,
        "second_phase": {name: x[:, -1] for name, x in records.items()},
        "steps_to_learn": [int(every * (x.argmax() + 1)) if x.any() else None for x in learnt],
    }


def table(runs: Sequence[dict]) -> str:
    """Markdown: means over the seeds, and the lowest and highest."""
    lines = [
        "| variant | phase 1: loss | diagonal probability | diagonal logit"
        " | off-diagonal Jacobian | phase 2: loss | diagonal probability"
        f" | seeds below {LEARNT:g}, after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in runs:
        first, second = x["summary"]["first_phase"], x["summary"]["second_phase"]
        cells = ["–"] * 4
        if first:
            cells = [
                spread(first["loss"], ".1e"),
                spread(first["diagonal_probability"], ".4f"),
                spread(first["diagonal_logit"], ".1f"),
                spread(first["off_diagonal_jacobian"], ".1e"),
            ]
        form = ".2f" if second["loss"].max() > 0.1 else ".1e"
        cells += [spread(second["loss"], form), spread(second["diagonal_probability"], ".3f")]
        steps = [s for s in x["summary"]["steps_to_learn"] if s is not None]
        when = f", {min(steps):,} to {max(steps):,} steps" if steps else ""
        cells.append(f"{len(steps)} of {len(second['loss'])}{when}")
        lines.append(f"| {x['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: np.ndarray, form: str) -> str:
    """Mean (lowest to highest)."""
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"


PANELS = (
    ("loss", "squared error", "linear"),
    ("off_diagonal_jacobian", "off-diagonal Jacobian", "log"),
    ("diagonal_probability", "probability of the own token", "linear"),
    ("logits_gradient", "norm of the logits' gradient", "log"),
)


def plot(runs: Sequence[dict], first: int, every: int, path: pathlib.Path) -> None:
    """Every variant over the steps, a line a seed: means hide that seeds differ."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for panel, (name, label, scale) in zip(axes, PANELS):
        for color, x in enumerate(runs):
            start = 0 if x["first_phase"] else first
            for seed, y in enumerate(x["records"][name]):
                panel.plot(
                    start + every * (1 + np.arange(len(y))),
                    y,
                    "-" if x["first_phase"] else ":",
                    color=f"C{color}",
                    lw=1,
                    label=None if seed else x["variant"],
                )
        panel.axvline(first, color="gray", ls="--", lw=1)
        panel.set_yscale(scale)
        panel.set_xlabel("step; the task changes at the dashed line")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_ylim(0, 2)
    axes[0].axhline(own_token_loss(), color="black", ls=":", lw=1)
    axes[0].legend(frameon=False, fontsize=8, loc="center left")
    figure.savefig(path, dpi=120)


def rounded(x: object) -> object:
    """Plain values of five digits, for JSON."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, (list, np.ndarray)):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all variants, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=30_000, help="steps of the first phase")
    parser.add_argument("--second", type=int, default=30_000, help="steps of the second phase")
    parser.add_argument("--every", type=int, default=500, help="steps that a record averages")
    names = [str(variant) for variant in VARIANTS]
    parser.add_argument("--only", choices=names, action="append", help="a variant; all if absent")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    variants = [x for x in VARIANTS if str(x) in (flags.only or names)]
    for name in ("first", "second"):
        steps = getattr(flags, name)
        if steps < 1 or steps % flags.every:
            parser.error(f"--{name} must be a positive multiple of --every; got {steps}")
    environment = measuring.environment(["optax"])
    fresh = jax.vmap(layer.init)(jax.random.split(jax.random.key(0), flags.seeds))
    for variant in variants:
        check(fresh, variant)
    runs = []
    for variant in variants:
        runs.append(run(variant, flags.seeds, flags.first, flags.second, flags.every))
        loss = runs[-1]["summary"]["second_phase"]["loss"]
        print(f"{variant}: loss {spread(loss, '.2g')}", flush=True)
    print(f"\n{table(runs)}\n\nbest function of the own token: {own_token_loss():.3f}")
    flags.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python -m experiments.learnability.run"
        f" --seeds={flags.seeds} --first={flags.first} --second={flags.second}"
        f" --every={flags.every}" + "".join(f" --only='{name}'" for name in flags.only or []),
        "environment": environment,
        "setting": {
            "tokens": layer.TOKENS,
            "width": layer.WIDTH,
            "batch": layer.BATCH,
            "learning_rate": training.RATE,
            "optimizer": "Adam",
            "dtype": "float32",
        },
        "own_token_loss": own_token_loss(),
        "runs": rounded(runs),
    }
    text = json.dumps(result, separators=(",", ":")).replace('{"variant"', '\n{"variant"')
    (flags.out / "learnability.json").write_text(text + "\n")
    plot(runs, flags.first, flags.every, flags.out / "learnability.png")


if __name__ == "__main__":
    main()
