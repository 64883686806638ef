"""Does an attention sink keep softmax from learning, and LUCID not? Both phases of the paper.

  python -m experiments.learnability.run
  python -m experiments.learnability.run --second=90000 --only=LUCID \\
      --only='softmax, temperature 1' --out=experiments/learnability/results/longer

One layer learns to reproduce its token, and from there the running average of the tokens. A step of
the five seeds of a variant takes about 3 ms on 2 idle CPU cores, the whole run 15 minutes. Writes
learnability.json and learnability.png.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import measuring, reporting
from experiments.learnability import layer, training

# A loss that counts as learnt: under 1% of what the best function of the own token leaves.
LEARNT = 0.01
TOLERANCE = 1e-9  # In float64.


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of attention; without `first_phase` a control that trains the second task only."""

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
# Variants whose curves begin with the second phase.
ALONE = [str(x) for x in VARIANTS if not x.first_phase]


def own_token_loss() -> float:
    """Returns the least loss in the second phase of any function of the own token alone.

    A layer that attends to nothing but its own token can reach that. The average at position `i`
    is `(x + sum of i − 1 others)/i`; the others are drawn without replacement.
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
    """Compares the layer of models `[N,…]` with the library's ops, or raises GateError."""
    with jax.enable_x64(True):
        double = {name: jnp.asarray(x, jnp.float64) for name, x in params.items()}
        given = double, variant.kind, jnp.asarray(variant.temperature, jnp.float64)
        found, exact = (
            jax.device_get(layer.outputs_and_gradients(*given, by_ops=by_ops))
            for by_ops in (False, True)
        )
    return measuring.judge(f"{variant}, by token", found, exact, TOLERANCE)


def run(variant: Variant, seeds: int, first: int, second: int, every: int) -> dict:
    """Trains the variant with every seed; returns its curves `[N,windows]` by name."""
    first = first if variant.first_phase else 0
    params, records = training.train(
        variant.kind, variant.temperature, jnp.arange(seeds), first, first + second, every
    )
    error = check(params, variant)
    curves = {name: np.asarray(x, np.float64) for name, x in records.items()}
    return {"variant": str(variant), "disagreement_with_ops": error, **reporting.rounded(curves)}


# What the table has of the first phase.
FIRST_PHASE = (
    ("loss", ".1e"), ("diagonal_probability", ".4f"), ("diagonal_logit", ".1f"),
    ("off_diagonal_jacobian", ".1e"),
)  # fmt: skip


def table(runs: Sequence[dict], first: int, every: int) -> str:
    """Returns a Markdown table of the last window of each phase: means over the seeds, ranges."""
    rows = []
    for x in runs:
        windows = 0 if x["variant"] in ALONE else first // every
        cells = [spread(x[n], form, windows) if windows else "–" for n, form in FIRST_PHASE]
        form = ".2f" if max(loss[-1] for loss in x["loss"]) > 0.1 else ".1e"
        cells += [spread(x["loss"], form), spread(x["diagonal_probability"], ".3f")]
        learnt = np.array(x["loss"])[:, windows:] < LEARNT
        steps = [int(every * (seed.argmax() + 1)) for seed in learnt if seed.any()]
        when = f", {min(steps):,} to {max(steps):,} steps" if steps else ""
        rows.append((x["variant"], *cells, f"{len(steps)} of {len(learnt)}{when}"))
    header = (
        "variant", "phase 1: loss", "diagonal probability", "diagonal logit",
        "off-diagonal Jacobian", "phase 2: loss", "diagonal probability",
        f"seeds below {LEARNT:g}, after",
    )  # fmt: skip
    return reporting.markdown(header, rows)


def spread(curves: Sequence[Sequence[float]], form: str, window: int = 0) -> str:
    """Returns mean (lowest to highest) of the last window of so many, by default of all."""
    values = np.array(curves)[:, window - 1]
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"


PANELS = (
    ("loss", "squared error", "linear"),
    ("off_diagonal_jacobian", "off-diagonal Jacobian", "log"),
    ("diagonal_probability", "probability of the own token", "linear"),
    ("logits_gradient", "norm of the logits' gradient", "log"),
)


def plot(runs: Sequence[dict], first: int, every: int, path: pathlib.Path) -> None:
    """Plots every variant against steps, with a line for each seed, since seeds differ."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for panel, (name, label, scale) in zip(axes, PANELS):
        for color, x in enumerate(runs):
            start, style = (first, ":") if x["variant"] in ALONE else (0, "-")
            for seed, y in enumerate(x[name]):
                steps = start + every * (1 + np.arange(len(y)))
                label_once = None if seed else x["variant"]
                panel.plot(steps, y, style, color=f"C{color}", lw=1, label=label_once)
        panel.axvline(first, color="gray", ls="--", lw=1)
        panel.set(ylabel=label, xlabel="step; the task changes at the dashed line", yscale=scale)
        panel.grid(alpha=0.3)
    axes[0].set_ylim(0, 2)
    axes[0].axhline(own_token_loss(), color="black", ls=":", lw=1)
    axes[0].legend(frameon=False, fontsize=8, loc="center left")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all variants, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=30_000, help="steps of the first phase")
    parser.add_argument("--second", type=int, default=30_000, help="steps of the second phase")
    parser.add_argument("--every", type=int, default=500, help="steps that a record averages over")
    names = [str(variant) for variant in VARIANTS]
    parser.add_argument("--only", choices=names, action="append", help="a variant; all if absent")
    flags = parser.parse_args(argv)
    variants = [x for x in VARIANTS if str(x) in (flags.only or names)]
    for name in ("first", "second"):
        steps = getattr(flags, name)
        if steps < 1 or steps % flags.every:
            parser.error(f"--{name} must be a positive multiple of --every; got {steps}")
    header = measuring.provenance(flags, ["optax"])
    fresh = jax.vmap(layer.init)(jax.random.split(jax.random.key(0), flags.seeds))
    for variant in variants:
        check(fresh, variant)
    runs = []
    for variant in variants:
        runs.append(run(variant, flags.seeds, flags.first, flags.second, flags.every))
        print(f"{variant}: loss {spread(runs[-1]['loss'], '.2g')}", flush=True)
    print(f"\n{table(runs, flags.first, flags.every)}")
    print(f"\nbest function of the own token: {own_token_loss():.3f}")
    setting = {
        "tokens": layer.TOKENS, "width": layer.WIDTH, "batch": layer.BATCH,
        "learning_rate": training.RATE, "optimizer": "Adam", "dtype": "float32",
    }  # fmt: skip
    steps = {"first_phase_steps": flags.first, "steps_of_a_record": flags.every}
    header |= {"setting": setting, **steps, "own_token_loss": own_token_loss()}
    reporting.write_json(flags.out / "learnability.json", **header, runs=runs)
    plot(runs, flags.first, flags.every, flags.out / "learnability.png")


if __name__ == "__main__":
    main()
