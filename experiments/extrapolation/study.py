"""Models of six variants on sequences beyond those of their training.

  python -m experiments.extrapolation.study --setting=babilong --variant=path --out=DIR
  python -m experiments.extrapolation.study --report --out=DIR

Settings are `babilong` and two of `experiments.retrieval.study`, whose machinery trains rates and
seeds side by side and evaluates at 1, 2, 4 and 8 times the last length of the training. A command
that was stopped by its clock, or killed, goes on when it is run again. The report prints tables and
draws accuracy against length.
"""

from collections.abc import Sequence

from experiments import reporting
from experiments.extrapolation import report
from experiments.extrapolation.stories import VOCAB_SIZE, Stories
from experiments.retrieval import study
from experiments.retrieval.runs import Group, Stage

# Attention and positions.
VARIANTS = {
    "softmax": ("softmax", "rope"),
    "softmax-nope": ("softmax", "none"),
    "path": ("softmax", "path"),
    "lucid": ("lucid", "rope"),
    "lucid-nope": ("lucid", "none"),
    "lucid-path": ("lucid", "path"),
}
RATES = (1e-3,)
# The longest sequences of a stage, their number in a step, and steps.
_BABILONG = ((128, 256, 1000), (256, 128, 1000), (512, 64, 500), (2048, 16, 500))
_RETRIEVAL = {name: study.STAGES[name] for name in ("2of6", "2of6-twice", "4of4")}
STAGES = _RETRIEVAL | {
    "babilong": (
        # Repeated texts, which teach lookups.
        study.STAGES["2of6"][0],
        *(Stage(Stories(n, shortest=n // 4), batch, steps) for n, batch, steps in _BABILONG),
    )
}


def make_group(setting: str, variant: str, seeds: tuple[int, ...]) -> Group:
    """Returns all rates and the given seeds of a variant."""
    attention, positions = VARIANTS[variant]
    model = (("vocab_size", VOCAB_SIZE),) if setting == "babilong" else ()
    return Group(
        setting, attention, STAGES[setting], RATES, seeds, positions=positions, model=model
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    study.command(parser, argv, STAGES, VARIANTS, make_group, report.merge)


if __name__ == "__main__":
    main()
