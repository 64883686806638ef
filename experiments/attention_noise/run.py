"""Attention noise: how much attention of trained softmax and LUCID models lands on the needle.

  python -m experiments.attention_noise.run --softmax=WORKDIR --lucid=WORKDIR

Both are models of generated retrieval (`experiments.retrieval`). The flags of the task must match
the models' training, or go beyond it; the defaults are those of keys of four digits of four values
(4of4). Writes attention_noise.json and attention_noise.png.
"""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from experiments import measuring, reporting
from experiments.activations import Trained
from experiments.attention_noise import weights
from experiments.retrieval.task import Retrieval

_SEED = 7 * 10**6
KINDS = ("softmax", "lucid")


def measure(kind: str, model: Trained, task: Retrieval, data: Sequence[weights.Questions]) -> dict:
    """Returns a record of a model: means over the sequences, and its accuracy.

    The accuracy is also measured without the inverse in one LUCID layer at a time, by its index.
    """
    found = [weights.describe(x, weights.weights(model, x), task.digits + 1) for x in data]

    def accuracy(model: Trained) -> float:
        return float(np.mean([weights.accuracy(model.model, model.params, x) for x in data]))

    lucid = [i for i, layer in enumerate(model.config.model.layer_kinds) if layer == "lucid"]
    return {
        "model": kind,
        "accuracy": accuracy(model),
        "accuracy_without_inverse": {str(i): accuracy(model.without_inverse(i)) for i in lucid},
        "heads": {name: np.mean([x[name] for x in found], 0) for name in found[0]},
    }


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


def table(records: Sequence[Mapping]) -> str:
    """Returns a Markdown table of each layer's head with the largest share on the value."""
    rows = []
    for record in records:
        heads = record["heads"]
        for layer, share in enumerate(heads["effective_share"]):
            head = int(np.argmax(share))
            cells = [f"{heads[name][layer][head]:{form}}" for name, _, form in COLUMNS]
            without = record["accuracy_without_inverse"].get(str(layer))
            without = "–" if without is None else f"{without:.1%}"
            rows.append(
                (record["model"], f"{record['accuracy']:.1%}", layer + 1, without, head + 1, *cells)
            )
    labels = (label for _, label, _ in COLUMNS)
    return reporting.markdown(
        ("model", "accuracy", "layer", "without A⁻¹ there", "head", *labels), rows
    )


def plot(
    models: Mapping[str, Trained],
    records: Sequence[Mapping],
    questions: weights.Questions,
    path: pathlib.Path,
) -> None:
    """Plots the best head's weights at each question of a sequence, the needles' values circled."""
    shown = []
    for (kind, model), record in zip(models.items(), records):
        found, share = weights.weights(model, questions), record["heads"]["effective_share"]
        layer, head = np.unravel_index(share.argmax(), share.shape)
        name = f"{kind}, layer {layer + 1}, head {head + 1}"
        shown.append((f"{name}: softmax", found.softmax[layer, head]))
        if model.config.model.layer_kinds[layer] == "lucid":
            shown.append((f"{name}: softmax · A⁻¹", found.effective[layer, head]))
    figure = Figure(figsize=(12, 3 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for panel, (title, x) in zip(panels, shown):
        # Linear below a hundredth, so that small weights and their signs are visible.
        scale = SymLogNorm(0.01, vmin=-1, vmax=1)
        style = {"cmap": "RdBu_r", "norm": scale, "aspect": "auto", "interpolation": "none"}
        image = panel.imshow(np.asarray(x), **style)
        circles = {"mfc": "none", "mec": "green", "ms": 5, "mew": 0.7}
        panel.plot(questions.value, np.arange(len(questions.value)), "o", **circles)
        panel.set_title(title, fontsize=9)
        panel.set(xlabel="position", ylabel="question")
    figure.colorbar(image, ax=panels, shrink=0.6)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both models on the same data, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=pathlib.Path, required=True, help="work directory")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--digits", type=int, default=4, help="digits of a key")
    parser.add_argument("--alphabet", type=int, default=4, help="values of a digit")
    parser.add_argument("--needles", type=int, default=64)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32, help="number of sequences")
    flags = parser.parse_args(argv)
    task = Retrieval(flags.length, flags.digits, flags.alphabet, flags.needles, flags.queries)
    header = measuring.provenance(flags, ["flax"])
    drawn = task.draw(jax.random.key(_SEED), flags.rows, flags.needles)
    data = [weights.questions(task, *x) for x in zip(*jax.device_get(drawn))]
    models = {kind: Trained.load(getattr(flags, kind)) for kind in KINDS}
    records = [measure(kind, model, task, data) for kind, model in models.items()]
    print(table(records))
    reporting.write_json(flags.out / "attention_noise.json", **header, records=records)
    plot(models, records, data[0], flags.out / "attention_noise.png")


if __name__ == "__main__":
    main()
