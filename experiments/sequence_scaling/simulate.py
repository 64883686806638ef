"""Simulates one layer's solve and attention over several devices; nothing is measured.

  python -m experiments.sequence_scaling.simulate

Simulates the context-parallel program event by event, for a layer of `lucid_1b` on 1 to 1024
devices and 32K to 10M tokens, and chooses the stripes. platforms.py has the times of devices and
links. Prints tables; writes simulation.json and efficiency.png. Takes about a minute.
"""

import dataclasses
import itertools
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


def record(name: str, x: Outcome) -> dict:
    """Returns a plan, its time and shares, and where the time of the forward pass goes."""
    forward = x.passes[0]
    path = dataclasses.asdict(forward.solve)
    path |= {n: getattr(forward, n) for n in ("inverses", "attention", "communication")}
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
        "forward_path_ms": {name: 1e3 * s for name, s in path.items()},
    }


def best_plans(records: Sequence[dict]) -> str:
    """Returns a table of plans, the time of both passes, and what they lose."""
    header = (
        "platform", "tokens, devices", "b", "heads over", "forward+backward", "efficiency",
        "imbalance and dependency", "communication", "repeated work",
    )  # fmt: skip
    shares = "efficiency", "imbalance_and_dependency", "communication", "repeated_work"
    rows = [
        (
            x["platform"], f"{tokens(x['tokens'])}, {x['devices']}", x["plan"]["width"],
            x["plan"]["split"], f"{x['both_ms']:.1f} ms", *(f"{x[name]:.1%}" for name in shares),
        )
        for x in records
        if x["plan"]
    ]  # fmt: skip
    return reporting.markdown(header, rows)


def table(records: Sequence[dict]) -> str:
    """Returns a table of the share lost and the efficiency of each variant, a row a case."""
    rows: dict[tuple, list[str]] = {}
    for x in records:
        case = x["platform"], f"{tokens(x['tokens'])}, {x['devices']}"
        cell = f"{x['imbalance_and_dependency']:.1%} ({x['efficiency']:.0%})"
        rows.setdefault(case, []).append(cell)
    variants = dict.fromkeys(x["variant"] for x in records)
    cells = [(*case, *row) for case, row in rows.items()]
    return reporting.markdown(("platform", "tokens, devices", *variants), cells)


def with_layout(x: Outcome, layout: str) -> Outcome:
    """Simulates the same plan in another layout."""
    if x.plan is None:
        return x
    return outcome(x.platform, x.layer, x.devices, dataclasses.replace(x.plan, layout=layout))


def grid(chosen: Sequence[Platform], lengths: Sequence[int], devices: Sequence[int]) -> list[dict]:
    """Returns efficiencies of the best striped plans by number of devices, in all layouts."""
    records = []
    for platform, length in itertools.product(chosen, lengths):
        striped = [best(platform, Layer(length), c) for c in devices]
        for layout in LAYOUTS:
            found = [with_layout(x, layout) for x in striped]
            case = {"platform": platform.name, "tokens": length, "layout": layout}
            ms, efficiency = [1e3 * x.seconds for x in found], [x.efficiency for x in found]
            records.append(case | {"devices": devices, "ms": ms, "efficiency": efficiency})
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


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    every = "H200,v5e,v5p,v6e"
    parser.add_argument("--platforms", default=every, help="comma-separated")
    parser.add_argument("--lengths", type=reporting.integers, default=LENGTHS, help="of the grid")
    parser.add_argument("--devices", type=reporting.integers, default=DEVICES, help="of the grid")
    flags = parser.parse_args(argv)
    chosen = platforms(flags.platforms.split(","))
    comparisons = {
        title: [
            record(name, best(platform, Layer(length), devices, space))
            for platform, (length, devices) in itertools.product(chosen, CLAIMS)
            for name, space in spaces.items()
        ]
        for title, spaces in COMPARISONS.items()
    }
    stages = next(iter(comparisons.values()))
    last = list(STAGES)[-1]
    print(f"The best plans\n\n{best_plans([x for x in stages if x['variant'] == last])}")
    for title, records in comparisons.items():
        print(f"\n{title}\n\n{table(records)}")
    everywhere = grid(chosen, flags.lengths, flags.devices)
    reporting.write_json(
        flags.out / "simulation.json",
        command=flags.command,
        prediction="of a model; nothing here was measured",
        stages=stages,
        grid=everywhere,
    )
    plot(everywhere, M if M in flags.lengths else flags.lengths[-1], flags.out / "efficiency.png")


if __name__ == "__main__":
    main()
