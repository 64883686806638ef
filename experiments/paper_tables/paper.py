"""The paper's numbers (arXiv 2602.10410) by table, with the tasks and lengths that give ours.

Percent, except the hit rate. Which tasks a row averages is our reading in places; `README.md` says
where.
"""

import dataclasses
from collections.abc import Mapping

K = 1024
# By row, the mean scores of a model at each length; fewer where the paper gives fewer.
Rows = Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
      rows: For each row the tasks whose scores it averages.
      metric: The score of a sample.
      samples: Samples of each task at each length.
      paper: The paper's numbers for each of its models.
    """

    title: str
    rows: Mapping[str, tuple[str, ...]]
    lengths: tuple[int, ...]
    metric: str
    samples: int
    paper: Mapping[str, Rows]


def _sweep(counts: tuple[int, ...]) -> dict[str, tuple[str, ...]]:
    return {f"{n} needles": (f"ruler_niah_k{n}",) for n in counts}


def _by_needles(*rows: tuple[float, ...]) -> Rows:
    return dict(zip(_sweep((2, 4, 6, 8, 10)), rows))


def _at_2048(*scores: float) -> Rows:
    return _by_needles(*((score,) for score in scores))


TABLES = {
    "needles": Table(
        title="Multi-needle retrieval by length, after fine-tuning at 64K",
        rows=_sweep((2, 4, 6, 8, 10)),
        lengths=(2 * K, 4 * K, 6 * K, 8 * K),
        metric="string_match_all",
        samples=500,
        paper={
            "Standard": _by_needles(
                (57.0, 59.8, 37.4, 21.8),
                (33.6, 37.4, 26.0, 23.2),
                (26.8, 20.4, 20.4, 22.4),
                (17.6, 19.0, 17.4, 17.0),
                (15.8, 15.2, 12.8, 11.4),
            ),
            "LUCID": _by_needles(
                (69.0, 68.6, 57.0, 48.0),
                (51.6, 51.4, 40.4, 33.0),
                (40.2, 33.4, 33.0, 31.6),
                (27.6, 27.6, 27.6, 24.2),
                (22.8, 23.2, 23.2, 23.4),
            ),
        },
    ),
    "pretrained": Table(
        title="Multi-needle retrieval at 2048 tokens, after pretraining",
        rows=_sweep((2, 4, 6, 8, 10)),
        lengths=(2 * K,),
        metric="string_match_all",
        samples=500,
        paper={
            "Standard": _at_2048(74.2, 51.0, 38.8),
            "Diff Transformer": _at_2048(72.4, 35.4, 26.0),
            "DeltaNet": _at_2048(37.0, 16.8, 11.0),
            "PaTH": _at_2048(61.4, 44.2, 37.2),
            "LUCID": _at_2048(76.6, 55.8, 43.6, 33.8, 25.2),
            "LUCID, QK-norm": _at_2048(75.4, 51.4, 37.2, 32.0, 20.4),
            "LUCID, max norm": _at_2048(74.2, 48.8, 37.2, 31.4, 19.6),
            "LUCID, learnt β": _at_2048(73.8, 48.0, 36.8, 31.8, 26.8),
        },
    ),
    "lengths": Table(
        title="Single- and multi-needle retrieval by length, after fine-tuning at 64K",
        rows={
            "SNIAH": ("ruler_niah_single_1", "ruler_niah_single_2", "ruler_niah_single_3"),
            "MNIAH": ("ruler_niah_multikey_1",),
        },
        lengths=(2 * K, 4 * K, 6 * K, 8 * K, 16 * K, 32 * K, 64 * K),
        metric="string_match_all",
        samples=500,
        paper={
            "Standard": {
                "SNIAH": (55.9, 47.5, 32.5, 19.3, 2, 0, 2),
                "MNIAH": (33.6, 37.4, 26.0, 23.2, 4, 4, 2),
            },
            "LUCID": {
                "SNIAH": (62.2, 68.6, 68.2, 50.2, 15, 1, 2),
                "MNIAH": (51.6, 51.4, 40.4, 33.2, 14, 12, 2),
            },
        },
    ),
    "babilong": Table(
        title="BABILong, mean of qa1 to qa5, after fine-tuning (the paper's are read off a plot)",
        rows={"qa1–5": tuple(f"babilong_qa{i}" for i in range(1, 6))},
        lengths=(32 * K, 64 * K, 128 * K),
        metric="lenient",
        samples=50,
        paper={
            "Standard": {"qa1–5": (14.5, 9, 4)},
            "Diff Transformer": {"qa1–5": (14, 7, 0)},
            "PaTH": {"qa1–5": (12.5, 12, 8)},
            "LUCID-PaTH": {"qa1–5": (25, 21, 24)},
        },
    ),
}

# The share of attention that is on the needle.
HIT_RATES = {"Standard": 0.1817, "LUCID": 0.2845}
