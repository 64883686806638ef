"""Inputs that expose errors: ill-conditioned keys, odd lengths, degenerate segments."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of one call of the op."""

    name: str
    batch: int = 1
    length: int = 63
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    keys: str = "random"
    segments: str = "none"
    directions: str = "random"
    w_beta: float | None = None

    def __str__(self) -> str:
        return self.name

    def draw(self) -> dict[str, np.ndarray | None]:
        """Draws float64 `q`, `k`, `v`, a cotangent of each output, int32 `segment_ids`, `beta`, and
        the `w` and `w_beta` of transitions."""
        rng = np.random.default_rng(sum(map(ord, self.name)))
        b, s, d = self.batch, self.length, self.head_dim
        kv, q = (b, s, self.kv_heads, d), (b, s, self.heads, d)
        return {
            "q": rng.normal(size=q),
            "k": draw_keys(rng, kv, self.keys),
            "v": rng.normal(size=kv),
            "y_bar": rng.normal(size=kv),
            "o_bar": rng.normal(size=q),
            "segment_ids": _segments(rng, b, s, self.segments),
            "beta": rng.choice([1, *rng.random(4), 1e-3, 1e-6, 0], kv[:3]),
            "w": draw_keys(rng, kv, self.directions),
            "w_beta": (
                rng.uniform(0, 2, kv[:3]) if self.w_beta is None else np.full(kv[:3], self.w_beta)
            ),
        }


def draw_keys(rng, shape, kind: str) -> np.ndarray:
    """Draws float64 keys `[B,S,K,D]` of a kind."""
    noise = rng.normal(size=shape)
    if kind == "random":
        return noise
    if kind == "identical":
        return np.broadcast_to(noise[:, :1], shape).copy()
    if kind.startswith("cosine"):
        # A common unit direction and unit noise, mixed to the given mean cosine.
        cosine = float(kind.removeprefix("cosine"))
        common = rng.normal(size=(shape[0], 1, *shape[2:]))
        common /= np.linalg.norm(common, axis=-1, keepdims=True)
        noise /= np.linalg.norm(noise, axis=-1, keepdims=True)
        return np.sqrt(cosine) * common + np.sqrt(1 - cosine) * noise
    if kind == "zeros":
        noise[:, rng.random(shape[1]) < 0.3] = 0
        noise[:, 0] = 0
        return noise
    if kind == "huge":
        noise[:, shape[1] // 3] *= 1e4
        return noise
    raise ValueError(kind)


# Segment ids may be any int32, in any order.
_IDS = [2**31 - 1, -(2**31), 9, 0]
# Documents start before, at and after the first row of a block, fill one, or have one token.
_CUTS = [1, 64, 127, 128, 129, 191, 192, 250, 256, 257]


def _segments(rng, b: int, s: int, kind: str) -> np.ndarray | None:
    if kind == "none":
        return None
    if kind == "single":  # Every segment has one token, so A is the identity.
        return np.broadcast_to(np.arange(s), (b, s)).astype(np.int32)
    if kind == "many":
        ids = (np.arange(s)[:, None] >= _CUTS).sum(-1)
        return np.stack([ids, *np.sort(rng.integers(0, 6, (b - 1, s)), 1)]).astype(np.int32)
    if kind == "long":  # The second one fills a block, and begins and ends in others.
        ids = (np.arange(s)[:, None] >= [100, 290]).sum(-1)
        return np.broadcast_to(ids, (b, s)).astype(np.int32)
    if kind == "interleaved":
        return rng.integers(0, 3, (b, s)).astype(np.int32)
    if kind == "packed":  # The first segment has one token; the other lengths are random.
        cuts = np.sort(rng.choice(np.arange(2, s), size=(b, 3), replace=True), 1)
        cuts[:, 0] = 1
        ids = (np.arange(s)[None, :, None] >= cuts[:, None, :]).sum(-1)
        return np.array(_IDS)[ids].astype(np.int32)
    raise ValueError(kind)


CASES = (
    Case("one_row", length=1),
    Case("two_rows", length=2, heads=4, kv_heads=2),
    Case("length_63", length=63, batch=2),
    Case("length_100_gqa", length=100, heads=6, kv_heads=2),
    Case("length_129_wide", length=129, head_dim=64),
    Case("length_257_odd_width", length=257, head_dim=68),
    Case("length_1000", length=1000),
    Case("length_1100_panels", length=1100, heads=2, kv_heads=2, batch=2),
    Case("identical_keys", length=300, keys="identical"),
    Case("cosine_0.9", length=300, keys="cosine0.9", head_dim=32),
    Case("cosine_0.99", length=300, keys="cosine0.99", head_dim=32),
    Case("zero_keys", length=130, keys="zeros"),
    Case("huge_key", length=130, keys="huge"),
    Case("packed", length=300, segments="packed", batch=2, heads=4, kv_heads=2),
    Case("packed_panels", length=1500, segments="packed", batch=2),
    Case("packed_identical", length=200, segments="packed", keys="identical"),
    Case("segments_of_one", length=70, segments="single"),
)
# Inputs of the solve with β, of which only the inverses of diagonal blocks depend on it.
BETA_CASES = tuple(
    case
    for case in CASES
    if case.name in ("one_row", "length_129_wide", "packed")
    or case.keys in ("identical", "zeros", "huge")
)
# Inputs of PaTH. Without a number, β is drawn from [0, 2].
PATH_CASES = (
    Case("path_one_row", length=1),
    Case("path_two_rows", length=2, heads=4, kv_heads=2),
    Case("path_length_63", length=63, batch=2, kv_heads=2),
    Case("path_length_257_odd_width", length=257, heads=6, kv_heads=2, head_dim=68),
    Case("path_length_900", length=900, w_beta=2),
    Case("path_identities", length=300, w_beta=0),
    Case("path_projections", length=300, w_beta=1),
    Case("path_reflections", length=300, w_beta=2),
    Case("path_identical_directions", length=300, directions="identical"),
    Case("path_zero_directions", length=300, directions="zeros"),
    Case("path_alike", length=300, directions="cosine0.99", keys="cosine0.99", w_beta=2),
    Case("path_identical_keys", length=300, keys="identical"),
    Case("path_identical_identities", length=300, keys="identical", w_beta=0),
    Case("path_zero_keys", length=130, keys="zeros"),
    Case("path_packed", length=300, segments="packed", batch=2, heads=4, kv_heads=2),
    Case("path_interleaved", length=300, segments="interleaved", heads=4, kv_heads=2),
    Case("path_segments_of_one", length=70, segments="single"),
)
# Documents in ascending order, which the kernels for GPUs solve side by side.
MANY_DOCUMENTS = Case("many", length=300, segments="many", batch=2, heads=4, kv_heads=2)
# Panels of 1024 columns hold several blocks of 128 rows here, or end inside one.
WIDE_CASES = tuple(
    case
    for case in CASES
    if case.name in ("length_257_odd_width", "length_1100_panels", "packed_panels")
)
