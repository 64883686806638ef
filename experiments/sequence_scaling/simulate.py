"""How one layer's solve and attention divide over devices: a model, not a measurement.

  python -m experiments.sequence_scaling.simulate

Plays the sequence-parallel program through, event by event, for the layers of `lucid_1b` on
1 to 1024 devices and 32K to 10M tokens, and chooses the stripes by it. What it knows of
devices and links is in platforms.py. Prints tables; writes simulation.json and
efficiency.png. Takes less than a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.sequence_scaling.layouts import LAYOUTS
from experiments.sequence_scaling.platforms import Platform, platforms
from experiments.sequence_scaling.program import Layer
from experiments.sequence_scaling.search import (
    DEFAULT,
    ONE_BLOCK,
    SEVERAL,
    Outcome,
    Space,
    best,
    outcome,
)

RESULTS = pathlib.Path(__file__).parent / "results"
LAYERS = 22  # Of lucid_1b.
K, M = 2**10, 2**20
LENGTHS = (32 * K, 128 * K, 512 * K, M, 4 * M, 10 * M)
DEVICES = tuple(2**i for i in range(11))
# Tokens and devices at which at most a tenth may be lost.
CLAIMS = ((128 * K, 16), (M, 64))
# What the plan may use, one thing more at a time; in italics what the program does not have.
STAGES = (
    ("stripes of 256", Space(shapes=DEFAULT, splits=(1,))),
    ("`mesh.tensor` too", Space(shapes=DEFAULT)),
    ("any width", Space()),
    ("*several blocks in a stripe*", Space(shapes=(*ONE_BLOCK, *SEVERAL), sharing=(False, True))),
)


def tokens(length: int) -> str:
    """128K, 10M."""
    return f"{length // M}M" if length % M == 0 else f"{length // K}K"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def record(x: Outcome) -> dict:
    """Plan, milliseconds and shares, for the results."""
    return {
        "platform": x.platform.name,
        "tokens": x.layer.length,
        "devices": x.devices,
        "plan": x.plan and dataclasses.asdict(x.plan),
        "diagonal_blocks": x.diagonal_blocks,
        "forward_ms": 1e3 * x.forward,
        "both_ms": 1e3 * x.seconds,
        "perfect_ms": 1e3 * x.perfect,
        "efficiency": x.efficiency,
        "imbalance_and_dependency": x.lost,
        "communication": x.communication,
        "repeated_work": x.repeated,
        "passes_ms": {
            name: {
                "solve": {k: 1e3 * s for k, s in dataclasses.asdict(one.solve).items()},
                "attention": 1e3 * one.attention,
                "key_gradient": 1e3 * one.key_gradient,
                "inverses": 1e3 * one.inverses,
                "communication": 1e3 * one.communication,
            }
            for name, one in zip(("forward", "backward"), x.passes)
        },
    }


def claims_table(found: Sequence[Outcome]) -> str:
    """What the best plan is, and what it loses."""
    header = (
        "platform", "tokens, devices", "b × m", "heads over", "diagonal blocks", "forward",
        "forward+backward", f"{LAYERS} layers", "efficiency", "imbalance and dependency",
        "communication", "repeated work",
    )  # fmt: skip
    rows = [
        (
            x.platform.name, f"{tokens(x.layer.length)}, {x.devices}",
            f"{x.plan.width} × {x.plan.blocks}", str(x.plan.split), str(x.diagonal_blocks),
            f"{1e3 * x.forward:.1f} ms", f"{1e3 * x.seconds:.1f} ms",
            f"{LAYERS * x.seconds:.2f} s", f"{x.efficiency:.1%}", f"{x.lost:.1%}",
            f"{x.communication:.1%}", f"{x.repeated:.1%}",
        )
        for x in found
        if x.plan
    ]  # fmt: skip
    return markdown(header, rows)


def path_table(found: Sequence[Outcome]) -> str:
    """Milliseconds of the forward pass by what the last device to finish waited for."""
    names = ("first", "gather", "later", "stripe")
    header = ("platform", "tokens, devices", *names, "inverses", "attention", "communication")
    rows = []
    for x in found:
        forward = x.passes[0]
        times = [getattr(forward.solve, name) for name in names]
        times += [forward.inverses, forward.attention, forward.communication]
        case = x.platform.name, f"{tokens(x.layer.length)}, {x.devices}"
        rows.append((*case, *(f"{1e3 * t:.2f}" for t in times)))
    return markdown(header, rows)


def compared(heads: Sequence[str], found: dict[tuple[str, int, int], list[Outcome]]) -> str:
    """Imbalance and dependency, and in parentheses the efficiency, of several plans."""
    rows = [
        (
            platform, f"{tokens(length)}, {devices}",
            *(f"{x.lost:.1%} ({x.efficiency:.0%})" for x in outcomes),
        )
        for (platform, length, devices), outcomes in found.items()
    ]  # fmt: skip
    return markdown(("platform", "tokens, devices", *heads), rows)


def grid_table(name: str, found: Sequence[Outcome]) -> str:
    """Efficiency, and milliseconds of both passes, by tokens and devices."""
    mine = {(x.layer.length, x.devices): x for x in found if x.platform.name == name}
    devices = sorted({c for _, c in mine})
    rows = []
    for length in sorted({s for s, _ in mine}):
        cells = [mine[length, c] for c in devices]
        rows.append(
            (tokens(length), *(f"{x.efficiency:.0%}, {1e3 * x.seconds:.4g}" for x in cells))
        )
    return markdown((f"{name}: tokens", *map(str, devices)), rows)


def relaid(x: Outcome, layout: str) -> Outcome:
    """The same plan under another layout."""
    if x.plan is None:
        return x
    plan = dataclasses.replace(x.plan, layout=layout)
    return outcome(x.platform, x.layer, x.devices, plan)


def plot(found: dict[str, list[Outcome]], length: int, path: pathlib.Path) -> None:
    """Efficiency against devices: by tokens, and by layout at one length."""
    names = list(dict.fromkeys(x.platform.name for x in found["striped"]))
    figure = Figure(figsize=(3.2 * len(names), 6), layout="constrained")
    panels = figure.subplots(2, len(names), sharex=True, sharey=True, squeeze=False)
    for name, (above, below) in zip(names, panels.T):
        striped = [x for x in found["striped"] if x.platform.name == name]
        for tokens_ in dict.fromkeys(x.layer.length for x in striped):
            points = [(x.devices, x.efficiency) for x in striped if x.layer.length == tokens_]
            above.semilogx(*zip(*points), base=2, marker="o", ms=3, label=tokens(tokens_))
        for layout, outcomes in found.items():
            points = [
                (x.devices, x.efficiency)
                for x in outcomes
                if (x.platform.name, x.layer.length) == (name, length)
            ]
            below.semilogx(*zip(*points), base=2, marker="o", ms=3, label=layout)
        above.set_title(f"{name}: striped")
        below.set_title(f"{name}: {tokens(length)} tokens")
        below.set_xlabel("devices")
        for axes in (above, below):
            axes.axhline(0.9, color="gray", lw=0.5)
            axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("efficiency, forward and backward")
        axes.legend(frameon=False, fontsize=8)
    panels[0, 0].set_ylim(0, 1.02)
    figure.savefig(path, dpi=110)


def grid(
    chosen: Sequence[Platform], lengths: Sequence[int], devices: Sequence[int]
) -> dict[str, list[Outcome]]:
    """The best striped plans, and the same under the other layouts."""
    striped = [best(p, Layer(s), c) for p in chosen for s in lengths for c in devices]
    return {
        layout: striped if layout == "striped" else [relaid(x, layout) for x in striped]
        for layout in LAYOUTS
    }


def compare(chosen: Sequence[Platform], spaces: Sequence[Space]) -> dict:
    """The best of every space, for every platform and claim."""
    return {
        (p.name, s, c): [best(p, Layer(s), c, space) for space in spaces]
        for p in chosen
        for s, c in CLAIMS
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--platforms",
        type=lambda x: x.split(","),
        default="H200,v5e,v5p,v6e",
        help="comma-separated",
    )
    parser.add_argument("--lengths", type=_integers, default=LENGTHS, help="of the grid, tokens")
    parser.add_argument("--devices", type=_integers, default=DEVICES, help="of the grid")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    chosen = platforms(flags.platforms)
    stages = compare(chosen, [space for _, space in STAGES])
    widths = compare(chosen, [Space(shapes=(shape,)) for shape in ONE_BLOCK])
    layouts = compare(chosen, [Space(layout) for layout in LAYOUTS])
    claims = [outcomes[2] for outcomes in stages.values()]
    everywhere = grid(chosen, flags.lengths, flags.devices)
    tables = (
        ("The best plans that the program has", claims_table(claims)),
        ("Critical path of the forward pass, ms", path_table(claims)),
        ("Lost to imbalance and dependency (efficiency); in italics what is not there", compared(
            [name for name, _ in STAGES], stages)),
        ("By width b, one block of a device in a stripe", compared(
            [str(width) for width, _ in ONE_BLOCK], widths)),
        ("By layout", compared(LAYOUTS, layouts)),
        *(
            ("Efficiency and ms, forward and backward", grid_table(p.name, everywhere["striped"]))
            for p in chosen
        ),
    )  # fmt: skip
    for title, table in tables:
        print(f"\n{title}\n\n{table}")
    result = {
        "command": "python -m experiments.sequence_scaling.simulate",
        "prediction": "of a model; nothing here was measured",
        "platforms": [dataclasses.asdict(p) for p in chosen],
        "stages": _records(stages, [name for name, _ in STAGES]),
        "widths": _records(widths, [str(width) for width, _ in ONE_BLOCK]),
        "layouts": _records(layouts, LAYOUTS),
        "grid": {layout: [_short(x) for x in found] for layout, found in everywhere.items()},
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "simulation.json").write_text(json.dumps(result, indent=1) + "\n")
    length = M if M in flags.lengths else flags.lengths[-1]
    plot(everywhere, length, flags.out / "efficiency.png")


def _short(x: Outcome) -> dict:
    return {name: value for name, value in record(x).items() if name != "passes_ms"}


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(","))


def _records(found: dict, names: Sequence[str]) -> list[dict]:
    return [
        {"of": name, **record(x)} for outcomes in found.values() for name, x in zip(names, outcomes)
    ]


if __name__ == "__main__":
    main()
