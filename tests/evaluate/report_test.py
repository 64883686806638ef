"""Tables of scores: means, intervals that hold for few samples, and counts."""

import math

import numpy as np
import pytest

from lucid_jax.evaluate.report import summarize, to_markdown, wilson_interval
from lucid_jax.evaluate.samples_file import Result
from lucid_jax.evaluate.tasks import Sources, get_task

GOLDEN = """\
# Scores at step 3

Percent, with 95% intervals (Wilson's).

| task | metric | 64 | 128 |
| --- | --- | --- | --- |
| ruler_niah_k2[prose] | string_match_all | – | 75.0 [30.1, 95.4] |
| babilong_qa1[prose] | strict | 0.0 [0.0, 65.8] | 50.0 [9.5, 90.5] |

- The model was trained on sequences of 64 tokens, fewer than 128.
- [prose]: generated text replaces the benchmark's own, so the scores are not comparable with \
published ones.
- Left out 2 of ruler_niah_k2[prose] at 64, the first because it is too long.

| task | length | score | samples | left out | cut prompts | cut tokens |
| --- | --- | --- | --- | --- | --- | --- |
| ruler_niah_k2[prose] | 64 | – | 0 of 4 | 2 | 0 | 0 |
| ruler_niah_k2[prose] | 128 | string_match_all 75.0 [30.1, 95.4] | 4 of 4 | 0 | 2 | 12 |
| babilong_qa1[prose] | 64 | strict 0.0 [0.0, 65.8]; lenient 50.0 [9.5, 90.5] | 2 of 2 | 0 | 0 | 0 |
| babilong_qa1[prose] | 128 | strict 50.0 [9.5, 90.5]; lenient 100.0 [34.2, 100.0] | 2 of 2 | 0 \
| 0 | 0 |
"""


def results(*scores, **meta):
    return [Result(i, 3, scores=values, meta=meta) for i, values in enumerate(scores)]


def reports():
    niah, babi = get_task("ruler_niah_k2"), get_task("babilong_qa1")
    full = [{"string_match_all": x} for x in (1.0, 0.5, 1.0, 0.5)]
    cut = [
        Result(i, 3, scores=scores, meta={"truncated_tokens": lost})
        for (i, scores), lost in zip(enumerate(full), (0, 5, 7, 0))
    ]
    too_long = [Result(0, 3, left_out="it is too long"), Result(1, 3, left_out="it is longer")]
    wrong = {"strict": 0.0, "lenient": 0.0}
    listed = {"strict": 0.0, "lenient": 1.0}
    right = {"strict": 1.0, "lenient": 1.0}
    return [
        summarize(niah, 64, too_long, 4),
        summarize(niah, 128, cut, 4),
        summarize(babi, 64, results(wrong, listed), 2),
        summarize(babi, 128, results(listed, right), 2),
    ]


def test_markdown_table():
    assert to_markdown("Scores at step 3", reports(), 64) == GOLDEN


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("samples", [1, 3, 20, 500])
def test_intervals_have_their_coverage(share, samples):
    """Sums over all outcomes. At the worst share and few samples Wilson's coverage is 0.84."""
    hits = np.arange(samples + 1)
    counts = np.array([math.comb(samples, int(k)) for k in hits], float)
    chance = counts * share**hits * (1 - share) ** (samples - hits)
    ends = [wilson_interval(k / samples, samples) for k in hits]
    covered = sum(p for p, (low, high) in zip(chance, ends) if low <= share <= high)
    assert covered >= 0.9
    assert all(0 <= low <= k / samples <= high <= 1 for k, (low, high) in zip(hits, ends))
    # The published interval of 0 of 20.
    assert wilson_interval(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_a_score_made_of_several_means_has_an_interval(tmp_path):
    folder = tmp_path / "gov_report"
    folder.mkdir()
    (folder / "validation.jsonl").write_text('{"id": "1", "input": "a", "output": "b"}\n')
    task = get_task("scrolls_gov_report", Sources(scrolls=str(tmp_path)))
    values = {"rouge1": 0.4, "rouge2": 0.1, "rougeL": 0.2}
    score = summarize(task, 64, results(values, values), 2).score
    assert score.mean == pytest.approx(0.2)
    ends = [wilson_interval(x, 2) for x in values.values()]
    assert (score.low, score.high) == pytest.approx(
        [math.prod(end[i] for end in ends) ** (1 / 3) for i in (0, 1)]
    )
