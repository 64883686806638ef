"""Simulates one layer's solve and attention over several devices; nothing is measured.

  python -m experiments.sequence_scaling.simulate

Simulates the context-parallel program event by event, for a layer of `lucid_1b` on 1 to 1024
devices and 32K to 10M tokens, and chooses the stripes. platforms.py has the times of devices and
links. Prints tables; writes simulation.json and efficiency.png. Takes about a minute.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import reporting
from experiments.sequence_scaling.layouts import LAYOUTS
from experiments.sequence_scaling.platforms import Platform, platforms
from experiments.sequence_scaling.program import Layer
from experiments.sequence_scaling.search import WIDTHS, Outcome, Space, best, outcome

K, M = 2**10, 2**20
LENGTHS = (32 * K, 128 * K, 512 * K, M, 4 * M, 10 * M)
DEVICES = tuple(2**i for i in range(11))
# Tokens and devices at which at most a tenth may be lost.
CLAIMS = ((128 * K, 16), (M, 64))
# Each adds one thing that the plan may use. 256 is the default of `mesh.stripe`.
STAGES = {
    "blocks of 256": Space(widths=(256,), splits=(1,)),
    "with `mesh.tensor`": Space(widths=(256,)),
    "with any `mesh.stripe`": Space(),
}
COMPARISONS = {
    "Lost to imbalance and dependency (efficiency)": STAGES,
    "By width b of a block": {str(width): Space(widths=(width,)) for width in WIDTHS},
    "By layout": {layout: Space(layout) for layout in LAYOUTS},
}


def tokens(length: int) -> str:
    """Returns a length as 128K or 10M."""
    return f"{length // M}M" if length % M == 0 else f"{length // K}K"


def case(x: Outcome) -> tuple[str, str]:
    """Returns the first cells of a table's row."""
    return x.platform.name, f"{tokens(x.layer.length)}, {x.devices}"


def best_plans(found: Sequence[Outcome]) -> str:
    """Returns a table of plans, the time of both passes, and what they lose."""
    header = (
        "platform", "tokens, devices", "b", "heads over", "forward+backward", "efficiency",
        "imbalance and dependency", "communication", "repeated work",
    )  # fmt: skip
    rows = [
        (
            *case(x), x.plan.width, x.plan.split,
            f"{1e3 * x.seconds:.1f} ms",
            *(f"{s:.1%}" for s in (x.efficiency, x.lost, x.communication, x.repeated)),
        )
        for x in found
        if x.plan
    ]  # fmt: skip
    return reporting.markdown(header, rows)


def path_ms(x: Outcome) -> dict[str, float]:
    """Returns milliseconds of the forward pass: the solve's critical path, and the rest."""
    forward = x.passes[0]
    others = {name: getattr(forward, name) for name in ("inverses", "attention", "communication")}
    seconds = dataclasses.asdict(forward.solve) | others
    return {name: 1e3 * s for name, s in seconds.items()}


def compared(names: Sequence[str], found: Sequence[Sequence[Outcome]]) -> str:
    """Returns a table of the share lost and the efficiency of several plans of each case."""
    rows = [(*case(xs[0]), *(f"{x.lost:.1%} ({x.efficiency:.0%})" for x in xs)) for xs in found]
    return reporting.markdown(("platform", "tokens, devices", *names), rows)


def with_layout(x: Outcome, layout: str) -> Outcome:
    """Simulates the same plan in another layout."""
    if x.plan is None or x.plan.layout == layout:
        return x
    return outcome(x.platform, x.layer, x.devices, dataclasses.replace(x.plan, layout=layout))


def grid(chosen: Sequence[Platform], lengths: Sequence[int], devices: Sequence[int]) -> list[dict]:
    """Returns efficiencies of the best striped plans by number of devices, in all layouts."""
    records = []
    for platform in chosen:
        for length in lengths:
            striped = [best(platform, Layer(length), c) for c in devices]
            for layout in LAYOUTS:
                found = [with_layout(x, layout) for x in striped]
                records.append(
                    {
                        "platform": platform.name,
                        "tokens": length,
                        "layout": layout,
                        "devices": devices,
                        "ms": [1e3 * x.seconds for x in found],
                        "efficiency": [x.efficiency for x in found],
                    }
                )
    return records


def plot(records: Sequence[dict], length: int, path: pathlib.Path) -> None:
    """Plots efficiency against devices: by tokens, and by layout at one length."""
    names = list(dict.fromkeys(x["platform"] for x in records))
    figure = Figure(figsize=(3.2 * len(names), 6), layout="constrained")
    panels = figure.subplots(2, len(names), sharex=True, sharey=True, squeeze=False)
    for name, (above, below) in zip(names, panels.T):
        for x in (x for x in records if x["platform"] == name):
            points = x["devices"], x["efficiency"]
            if x["layout"] == "striped":
                above.semilogx(*points, base=2, marker="o", ms=3, label=tokens(x["tokens"]))
            if x["tokens"] == length:
                below.semilogx(*points, base=2, marker="o", ms=3, label=x["layout"])
        above.set_title(f"{name}: striped")
        below.set(title=f"{name}: {tokens(length)} tokens", xlabel="devices")
        for axes in (above, below):
            axes.axhline(0.9, color="gray", lw=0.5)
            axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("efficiency, forward and backward")
        axes.legend(frameon=False, fontsize=8)
    panels[0, 0].set_ylim(0, 1.02)
    figure.savefig(path, dpi=110)


def record(name: str, x: Outcome) -> dict:
    """Returns a plan, its time and shares, for the results."""
    return {
        "variant": name,
        "platform": x.platform.name,
        "tokens": x.layer.length,
        "devices": x.devices,
        "plan": x.plan and dataclasses.asdict(x.plan),
        "both_ms": 1e3 * x.seconds,
        "efficiency": x.efficiency,
        "imbalance_and_dependency": x.lost,
        "communication": x.communication,
        "repeated_work": x.repeated,
        "forward_path_ms": path_ms(x),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__)
    parser.add_argument(
        "--platforms",
        type=lambda x: x.split(","),
        default="H200,v5e,v5p,v6e",
        help="comma-separated",
    )
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS, help="of the grid")
    parser.add_argument("--devices", type=reporting.integers, default=DEVICES, help="of the grid")
    flags = parser.parse_args(argv)
    chosen = platforms(flags.platforms)
    comparisons = {
        title: [
            [best(p, Layer(s), c, space) for space in spaces.values()]
            for p in chosen
            for s, c in CLAIMS
        ]
        for title, spaces in COMPARISONS.items()
    }
    stages = next(iter(comparisons.values()))
    print(f"The best plans\n\n{best_plans([outcomes[-1] for outcomes in stages])}")
    for (title, spaces), found in zip(COMPARISONS.items(), comparisons.values()):
        print(f"\n{title}\n\n{compared(list(spaces), found)}")
    everywhere = grid(chosen, flags.lengths, flags.devices)
    result = {
        "command": reporting.command_line(parser, argv),
        "prediction": "of a model; nothing here was measured",
        "stages": [record(name, x) for xs in stages for name, x in zip(STAGES, xs)],
        "grid": everywhere,
    }
    reporting.write_json(flags.out / "simulation.json", result)
    plot(everywhere, M if M in flags.lengths else flags.lengths[-1], flags.out / "efficiency.png")


if __name__ == "__main__":
    main()
