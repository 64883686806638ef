"""The loss curve as a picture."""

import os
import pathlib

import matplotlib
from matplotlib import figure

from lucid_jax.training.writer import read_metrics


def plot_loss(workdir: str | os.PathLike) -> pathlib.Path:
    """Draws training and evaluation loss by step into `loss.png`; returns its path."""
    lines = read_metrics(workdir)
    # Without pyplot, which has global state and may want a display.
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        chart = figure.Figure(figsize=(7, 4), layout="constrained")
        axes = chart.add_subplot()
        for name, style in (("loss", {"lw": 1}), ("eval_loss", {"marker": "o", "ms": 4})):
            points = [(x["step"], x[name]) for x in lines if isinstance(x.get(name), float)]
            if points:
                axes.plot(*zip(*points), label=name.replace("_", " "), **style)
        unigram = [x["eval_unigram_loss"] for x in lines if "eval_unigram_loss" in x]
        if unigram:
            axes.axhline(unigram[-1], color="gray", ls=":", label="best unigram model")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        if axes.has_data():
            axes.legend(frameon=False)
        path = pathlib.Path(workdir) / "loss.png"
        chart.savefig(path, dpi=120)
    return path
