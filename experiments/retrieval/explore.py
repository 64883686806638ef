"""Which forms of generated retrieval a small softmax model learns: a broad, cheap search.

  python -m experiments.retrieval.explore --part=0/2 --seconds=200 --out=DIR

For each form, one program trains models of all rates and scales of the initial parameters side
by side. `--part=i/n` takes every n-th form, for one GPU of several. Prints as it goes, and
writes explore_<part>.json after every form.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.retrieval.runs import (
    Run,
    Stage,
    evaluation_rows,
    layout_of,
    make_chunk,
    needle_counts,
    training_rows,
    write,
)
from experiments.retrieval.task import Retrieval
from lucid_jax.train_step import init_state

RESULTS = pathlib.Path(__file__).parent / "results"
RATES = (1e-3, 3e-3)
# Over that of the configuration, for all matrices.
SCALES = (1.0, 5.0)
_MODEL = {
    "num_layers": 4, "embed_dim": 128, "mlp_dim": 384, "num_heads": 2, "num_kv_heads": 2,
    "implementation": "reference",
}  # fmt: skip


def forms() -> dict[str, Retrieval]:
    """What is tried, the most telling first; 16 pairs, and nearly as few places."""

    def form(digits: int, alphabet: int, needles: int = 16, noise: int = 4, **changes):
        task = Retrieval(1000, digits, alphabet, needles, queries=needles, **changes)
        length = (needles + noise) * task.width + task.asked_tokens
        return Retrieval(length + length % 2, digits, alphabet, needles, queries=needles, **changes)

    return {
        "1of36": form(1, 36),
        "2of6": form(2, 6),
        "1of36, in order": form(1, 36, in_order=0.5, other_weight=1.0),
        "2of6, echo": form(2, 6, echo=True),
        "3of4, echo, in order": form(3, 4, echo=True, in_order=0.5, other_weight=1.0),
        "2of6, echo, in order": form(2, 6, echo=True, in_order=0.5, other_weight=1.0),
    }


def explore(
    chosen: Mapping[str, Retrieval], stage: Mapping[str, int], model: Mapping[str, Any],
    seconds: float, path: pathlib.Path,
) -> None:  # fmt: skip
    """Trains on every form, prints and writes."""
    start = time.monotonic()
    records = []
    for name, task in chosen.items():
        points = []
        for point in _curves(Stage(task, **stage), model):
            points.append(point)
            text = "  ".join(f"{k} {v['loss']:.2f} {v['accuracy']:.2f}" for k, v in point.items())
            print(f"[{time.monotonic() - start:4.0f} s] {name}: {text}", flush=True)
            if time.monotonic() - start > seconds:
                return
        records.append({"form": name, "curve": points})
        write(path, records)


def _curves(stage: Stage, model: Mapping[str, Any]):
    """Step, loss and accuracy with the most needles of every rate and scale, chunk by chunk."""
    run = Run(
        "", "softmax", (stage,), model=tuple(model.items()), optim=(("final_ratio", 1.0),),
        chunk=min(250, stage.steps),
    )  # fmt: skip
    config = run.config(stage)
    state = init_state(config, layout_of(config))
    settings = list(itertools.product(RATES, SCALES))
    rates, scales = (jnp.array(x) for x in zip(*settings))

    def scaled(scale):
        # The scales of norms are vectors; with those of all layers, matrices that begin at 1.
        def scale_kernel(path, x):
            return x if "norm" in jax.tree_util.keystr(path) else scale * x

        return jax.tree_util.tree_map_with_path(scale_kernel, state.params)

    states = jax.vmap(lambda s: state.__class__(state.step, scaled(s), state.opt_state))(scales)
    program = jax.jit(
        jax.vmap(make_chunk(run, stage), (0, 0, None, None, None, None)), donate_argnums=0
    )
    evaluation = evaluation_rows(stage.task, 64)
    text, answers = training_rows(stage, 0)
    assert needle_counts(stage.task)[-1] == stage.task.needles
    for first in range(0, stage.steps, run.chunk):
        chunk = slice(first, first + run.chunk)
        states, losses, found = program(states, rates, text[chunk], answers[chunk], *evaluation)
        yield {
            f"{rate:.0e}/{scale:g}": {
                "step": first + run.chunk, "loss": float(loss), "accuracy": float(accuracy),
            }
            for (rate, scale), loss, accuracy in zip(settings, losses.mean(1), found[:, -1])
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    chosen = dict(list(forms().items())[part::parts])
    path = options.out / f"explore_{part}.json"
    explore(chosen, {"rows": 128, "steps": 2000}, _MODEL, options.seconds, path)


if __name__ == "__main__":
    main()
