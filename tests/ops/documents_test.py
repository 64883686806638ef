"""Documents of packed sequences: where they enter blocks, and in which order blocks are solved."""

import jax.numpy as jnp
import numpy as np
import pytest

from lucid_jax.ops import documents
from lucid_jax.ops.documents import entering_documents, entering_runs, order_by_depth, pad_segments

ROWS, LENGTH = 8, 160
LOWEST, LARGEST = -(2**31), 2**31 - 1
# Ids of runs, and whether every id has one run and short sequences are seen to be so.
RUNS = {
    "one": ([5], True, True),
    "ascending": ([LOWEST, 0, 3, LARGEST], True, True),
    "padding": ([1, 2, 7, 0], True, True),
    "any order": ([3, LARGEST, LOWEST, 9, 0], True, False),
    "descending": ([4, 3, 2], True, False),
    "returning": ([1, 2, 1, 4], False, False),
    "returning last": ([1, 2, 4, 1], False, False),
}


def draw(ids, rng):
    lengths = rng.choice([1, 2, 7, 8, 9, 16, 30], len(ids))
    return np.repeat(np.array(ids, np.int32), lengths)


def expected(ids, rows, one_document, reverse):
    """Finds, token by token, where the document of each block's first row starts."""
    ids = ids[::-1] if reverse else ids
    starts = [t for t in range(len(ids)) if t == 0 or ids[t] != ids[t - 1]]
    starts = [0] if one_document else starts
    first, count = [], []
    for row in range(0, len(ids), rows):
        begin = max(t for t in starts if t <= row)
        inside = [t - row for t in starts if row <= t < row + rows]
        count.append(min(inside, default=rows))
        first.append(begin if count[-1] else row)
    return first, count


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_documents_enter_blocks(name, long, reverse, monkeypatch):
    values, contiguous, ascending = RUNS[name]
    monkeypatch.setattr(documents, "_SHORT", 0 if long else 8192)
    rng = np.random.default_rng(0)
    draws = [pad_segments(jnp.asarray(draw(values, rng))[None], LENGTH)[0] for _ in range(20)]
    ids = np.stack(draws)
    one = not (contiguous if long else ascending)
    for op, one_document in ((entering_documents, one), (entering_runs, False)):
        found = np.stack(op(jnp.asarray(ids), ROWS, reverse=reverse), 1)
        np.testing.assert_array_equal(
            found, [expected(x, ROWS, one_document, reverse) for x in ids]
        )


def test_an_item_follows_what_it_depends_on():
    rng = np.random.default_rng(1)
    for _ in range(20):
        ids = pad_segments(jnp.asarray(draw(range(9), rng))[None], 2 * LENGTH)
        entering = entering_documents(ids, ROWS)
        n = ids.shape[1] // ROWS
        order = np.asarray(order_by_depth(entering, ROWS)[0]).tolist()
        assert sorted(order) == list(range(2 * n))
        start, count = (np.asarray(x[0]) for x in entering)
        filled = [i for i in order if (count[i] > 0 if i < n else count[i - n] < ROWS)]
        assert order[: len(filled)] == filled, "items without rows come last"
        for item in filled:
            if item < n:
                first = start[item] // ROWS
                for needed in (n + first, *range(first + 1, item)):
                    assert order.index(needed) < order.index(item)
