"""Attention noise: how much attention of trained softmax and LUCID models lands on the needle.

  python -m experiments.attention_noise.run --softmax=WORKDIR --lucid=WORKDIR

Both are models of generated retrieval (`experiments.retrieval`); the task's own flags must be
those that they were trained on, or wider; the defaults are those of keys of four digits of four
values (4of4). Writes attention_noise.json and attention_noise.png.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from experiments import measuring
from experiments.activations import Trained
from experiments.attention_noise import weights
from experiments.retrieval.task import Retrieval

RESULTS = pathlib.Path(__file__).parent / "results"
_SEED = 7 * 10**6
KINDS = ("softmax", "lucid")


def measure(model: Trained, task: Retrieval, rows: Sequence[weights.Questions]) -> dict:
    """Means over the rows, `[L,H]` by name, and the share of answers that are right.

    The latter also with no inverse in one LUCID layer at a time, by its number from 0.
    """
    found = [weights.describe(row, weights.weights(model, row), task.digits + 1) for row in rows]
    lucid = [i for i, kind in enumerate(model.config.model.layer_kinds) if kind == "lucid"]
    return {
        "attention": model.config.model.attention,
        "temperature": model.config.model.temperature,
        "accuracy": accuracy(model, rows),
        "accuracy_without_inverse": {
            str(layer): accuracy(model.without_inverse(layer), rows) for layer in lucid
        },
        "heads": {name: np.mean([x[name] for x in found], 0) for name in found[0]},
    }


def accuracy(model: Trained, rows: Sequence[weights.Questions]) -> float:
    """The share of answers that are right."""
    return float(np.mean([weights.right(model, row) for row in rows]))


def best_head(record: Mapping) -> tuple[int, int]:
    """Layer and head with the largest share of effective weight on the value."""
    share = record["heads"]["effective_share"]
    layer, head = np.unravel_index(share.argmax(), share.shape)
    return int(layer), int(head)


COLUMNS = (
    ("value", "softmax on the value", ".3f"),
    ("needle", "on the needle", ".3f"),
    ("own", "on the own token", ".3f"),
    ("entropy", "entropy", ".2f"),
    ("effective_value", "effective weight on the value", ".3f"),
    ("effective_share", "its share", ".3f"),
    ("largest", "largest", ".1%"),
    ("effective_size", "sum of sizes", ".2f"),
    ("negative", "negative", ".3f"),
)


def table(records: Mapping[str, dict]) -> str:
    """Markdown: of each layer the head with the largest share of weight on the value."""
    lines = [
        "| model | accuracy | layer | without A⁻¹ there | head | "
        + " | ".join(x for _, x, _ in COLUMNS)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for kind, record in records.items():
        for layer, share in enumerate(record["heads"]["effective_share"]):
            head = int(share.argmax())
            cells = [f"{record['heads'][name][layer, head]:{form}}" for name, _, form in COLUMNS]
            without = record["accuracy_without_inverse"].get(str(layer))
            lines.append(
                f"| {kind} | {record['accuracy']:.1%} | {layer + 1}"
                f" | {'–' if without is None else f'{without:.1%}'} | {head + 1} | "
                + " | ".join(cells)
                + " |"
            )
    return "\n".join(lines)


def plot(
    models: Mapping[str, Trained],
    records: Mapping[str, dict],
    row: weights.Questions,
    path: pathlib.Path,
) -> None:
    """Weights of the best head at every question of one row; circles are the needles' values."""
    shown = []
    for kind, model in models.items():
        found, (layer, head) = weights.weights(model, row), best_head(records[kind])
        name = f"{kind}, layer {layer + 1}, head {head + 1}"
        shown.append((f"{name}: softmax", found.softmax[layer, head]))
        if model.config.model.layer_kinds[layer] == "lucid":
            shown.append((f"{name}: softmax · A⁻¹", found.effective[layer, head]))
    figure = Figure(figsize=(12, 3 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for panel, (title, x) in zip(panels, shown):
        # Linear below a hundredth, so that small weights are seen and their signs.
        scale = SymLogNorm(0.01, vmin=-1, vmax=1)
        image = panel.imshow(
            np.asarray(x), cmap="RdBu_r", norm=scale, aspect="auto", interpolation="none"
        )
        panel.plot(
            row.value, np.arange(len(row.value)), "o", mfc="none", mec="green", ms=5, mew=0.7
        )
        panel.set_title(title, fontsize=9)
        panel.set_ylabel("question")
    panels[-1].set_xlabel("position")
    figure.colorbar(image, ax=panels, shrink=0.6)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both models on the same rows, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=pathlib.Path, required=True, help="work directory")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--digits", type=int, default=4, help="of a key")
    parser.add_argument("--alphabet", type=int, default=4, help="values of a digit")
    parser.add_argument("--needles", type=int, default=64)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    task = Retrieval(flags.length, flags.digits, flags.alphabet, flags.needles, flags.queries)
    environment = measuring.environment(["flax"])
    drawn = task.rows(jax.random.key(_SEED), flags.rows, flags.needles)
    rows = [weights.questions(task, *row) for row in zip(*jax.device_get(drawn))]
    models = {kind: Trained.load(getattr(flags, kind)) for kind in KINDS}
    records = {kind: measure(model, task, rows) for kind, model in models.items()}
    print(table(records))
    flags.out.mkdir(parents=True, exist_ok=True)
    given = [f"--{name}={getattr(flags, name)}" for name in (*KINDS, "length", "digits")]
    given += [f"--{name}={getattr(flags, name)}" for name in ("alphabet", "needles", "queries")]
    given += [f"--rows={flags.rows}"]
    result = {
        "command": f"python -m experiments.attention_noise.run {' '.join(given)}",
        "environment": environment,
        "records": {
            kind: record | {"heads": {k: x.round(5).tolist() for k, x in record["heads"].items()}}
            for kind, record in records.items()
        },
    }
    (flags.out / "attention_noise.json").write_text(json.dumps(result) + "\n")
    plot(models, records, rows[0], flags.out / "attention_noise.png")


if __name__ == "__main__":
    main()
