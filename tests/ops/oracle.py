"""float64 oracles in numpy, written from the definitions; they share no code with any backend.

Outputs and gradients are written by hand, so that a wrong automatic derivative cannot confirm
itself; `oracle_test.py` compares the gradients with finite differences. `rounding` is applied to
the operands that a low-precision backend rounds, to measure the error of its dtype alone.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg


def identity(x):
    return x


def _products(x, y):
    """Returns the dot products `[B,H,S,P]` of the rows of `x [B,S,H,D]` and `y [B,P,H,D]`."""
    return x.swapaxes(1, 2) @ y.transpose(0, 2, 3, 1)


def _sums(weights, x):
    """Returns the sums `[B,S,H,D]` of the rows of `x [B,P,H,D]` with `weights [B,H,S,P]`."""
    return (weights @ x.swapaxes(1, 2)).swapaxes(1, 2)


def normalized_keys(k):
    """Returns `k̂ [B,S,K,D]` and the norms of the keys `[B,S,K,1]`, 1 for zero keys."""
    k = np.asarray(k, np.float64)
    norm = np.sqrt((k * k).sum(-1, keepdims=True))
    norm = np.where(norm == 0, 1.0, norm)
    return k * np.sqrt(k.shape[-1]) / norm, norm


def gram(k_hat, segment_ids):
    """Returns dense `A [B,K,S,S]` with its unit diagonal."""
    return _gram_of_scores(_products(k_hat, k_hat), k_hat.shape[-1], segment_ids)


def _gram_of_scores(scores, d, segment_ids):
    s = scores.shape[-1]
    a = np.tril(np.exp(scores / np.sqrt(d) - np.sqrt(d)), -1)
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        a = a * (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return a + np.eye(s)


def unit_directions(w):
    """Returns `w/‖w‖ [B,S,K,D]` and the norms `[B,S,K,1]`, 1 for zero directions."""
    k_hat, norm = normalized_keys(w)
    return k_hat / np.sqrt(w.shape[-1]), norm


class PathScores:
    """The scores `q_iᵀ H_i ⋯ H_{j+1} k_j` of PaTH, one transition after another.

    `values [B,H,S,S]` are zero above the diagonal and between segments.
    """

    def __init__(self, q, k, w, beta, segment_ids=None, rounding=identity):
        self.q = rounding(np.asarray(q, np.float64))
        b, s, kv_heads, d = k.shape
        self.w, self.norm = unit_directions(w)
        self.beta = np.asarray(beta, np.float64)
        ids = np.zeros((b, s)) if segment_ids is None else np.asarray(segment_ids)
        # Keys [B,i,j,K,D] after the transition of token i.
        self.keys = np.zeros((b, s, s, kv_heads, d))
        self.same = ids[:, :, None] == ids[:, None, :]
        self.rounding = rounding
        keys = np.zeros((b, s, kv_heads, d))
        for i in range(s):
            keys = self._transition(i, keys)
            keys[:, i] = k[:, i]
            self.keys[:, i] = keys
        self.group = q.shape[2] // kv_heads
        grouped = self.q.reshape(b, s, kv_heads, self.group, d)
        values = np.einsum("bihgd,bijhd->bhgij", grouped, rounding(self.keys), optimize=True)
        values = values.reshape(b, -1, s, s)
        self.values = np.where(np.tril(self.same)[:, None], values, 0)

    def _transition(self, i, x):
        """Returns the vectors `x [B,j,K,D]` times `H_i`, those of its segment."""
        w, beta = self.w[:, i, None], self.beta[:, i, None, :, None]
        moved = x - beta * (x * w).sum(-1, keepdims=True) * w
        return np.where(self.same[:, i, :, None, None], moved, x)

    def gradients(self, values_bar):
        """Returns the cotangents by name, and the norms of those of `w` and `beta` without
        cancellation, of the sums of absolute terms."""
        b, s, kv_heads, d = self.w.shape
        values_bar = np.where(np.tril(self.same)[:, None], values_bar, 0)
        bar = values_bar.reshape(b, kv_heads, self.group, s, s)
        grouped = self.q.reshape(b, s, kv_heads, self.group, d)
        q_bar = np.einsum("bhgij,bijhd->bihgd", bar, self.rounding(self.keys), optimize=True)
        k_bar, keys_bar, w_bar, w_size = (np.zeros(self.w.shape) for _ in range(4))
        beta_bar, beta_size = np.zeros(self.beta.shape), np.zeros(self.beta.shape)
        for i in reversed(range(s)):
            keys_bar += np.einsum("bhgj,bhgd->bjhd", bar[:, :, :, i], grouped[:, i])
            k_bar[:, i] = keys_bar[:, i]
            keys_bar[:, i] = 0
            before = self.keys[:, i - 1] if i else np.zeros(keys_bar.shape)
            here = self.same[:, i, :, None, None]
            x, x_bar = (np.where(here, a, 0) for a in (before, keys_bar))
            w, beta = self.w[:, i, None], self.beta[:, i, :, None]
            along, along_bar = ((a * w).sum(-1, keepdims=True) for a in (x, x_bar))
            beta_bar[:, i] = -(along * along_bar).sum((1, 3))
            beta_size[:, i] = np.abs(along * along_bar).sum((1, 3))
            w_bar[:, i] = -beta * (along_bar * x + along * x_bar).sum(1)
            w_size[:, i] = beta * (np.abs(along_bar * x) + np.abs(along * x_bar)).sum(1)
            keys_bar = self._transition(i, keys_bar)
        w_bar, _ = _normalization_gradient(self.w, self.norm, w_bar)
        _, w_size = _normalization_gradient(self.w, self.norm, w_size)
        gradients = {"q": q_bar.reshape(self.q.shape), "k": k_bar, "w": w_bar, "w_beta": beta_bar}
        return gradients, {"w": w_size, "w_beta": np.linalg.norm(beta_size)}


def _solve(a, rhs, transposed):
    """Solves `A x = rhs` or `Aᵀ x = rhs` for each head; `rhs` and `x` are `[B,S,K,D]`."""
    x = np.empty(rhs.shape)
    for b in range(rhs.shape[0]):
        for h in range(rhs.shape[2]):
            x[b, :, h] = scipy.linalg.solve_triangular(
                a[b, h], rhs[b, :, h], trans=int(transposed), lower=True, unit_diagonal=True
            )
    return x


def precondition(k, v, segment_ids=None, rounding=identity, beta=None):
    """Returns `y = A⁻¹ v`, or `(I + diag(β) stril(A))⁻¹ diag(β) v` given `β [B,S,K]`."""
    k_hat, _ = normalized_keys(k)
    a = rounding(gram(rounding(k_hat), segment_ids))
    rows, beta = _scaled_rows(a, beta)
    return rounding(_solve(rows, beta * np.asarray(v, np.float64), transposed=False))


def _scaled_rows(a, beta):
    """Returns `diag(β) A` and `β [B,S,K,1]`, or `A` and 1."""
    if beta is None:
        return a, 1.0
    beta = np.asarray(beta, np.float64)[..., None]
    return beta.swapaxes(1, 2) * a, beta


def precondition_gradients(k, v, y_bar, segment_ids=None, rounding=identity, beta=None):
    """Returns the cotangents of `k`, `v` and `beta` by name, and the norm of `k̄` before projection.

    With `u = (I + diag(β) stril(A))⁻ᵀ ȳ` and `N = stril(A)` they hold `v̄ = β u`, `β̄ = u·(v − N y)`.

    The last step of `k̄` removes its component along `k̂`. For nearly parallel keys that is almost
    all of it, and for identical keys all of it. The error of a finite precision is therefore
    relative to the norm before this step.
    """
    k_hat, norm = normalized_keys(k)
    d = k_hat.shape[-1]
    a = rounding(gram(rounding(k_hat), segment_ids))
    rows, beta = _scaled_rows(a, beta)
    exact_y = _solve(rows, beta * np.asarray(v, np.float64), transposed=False)
    u = _solve(rows, np.asarray(y_bar, np.float64), transposed=True)
    y, v_bar = rounding(exact_y), rounding(beta * u)
    # The rows of y and v̄ have the relative errors of these.
    beta_bar = (rounding(u) * rounding(v - _sums(np.tril(a, -1), exact_y))).sum(-1)
    w = rounding(-np.tril(a, -1) * _products(v_bar, y))
    k_hat_bar = _sums(w + w.swapaxes(2, 3), rounding(k_hat)) / np.sqrt(d)
    k_bar, size = _normalization_gradient(k_hat / np.sqrt(d), norm, np.sqrt(d) * k_hat_bar)
    return {"k": k_bar, "v": v_bar, "beta": beta_bar}, size


def _normalization_gradient(unit, norm, unit_bar):
    """Pulls a cotangent back through `x/‖x‖`; returns it and its norm before the projection."""
    scale = np.where((unit == 0).all(-1, keepdims=True), 0.0, 1 / norm)
    along = (unit * unit_bar).sum(-1, keepdims=True)
    return scale * (unit_bar - unit * along), np.linalg.norm(scale * unit_bar)


def softmax_weights(q, k, segment_ids=None, temperature=1.0):
    """Returns the softmax weights `[B,H,S,S]`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return _causal_softmax(_products(q, k) / (np.sqrt(q.shape[-1]) * temperature), segment_ids)


def _causal_softmax(logits, segment_ids):
    s = logits.shape[-1]
    visible = np.tril(np.ones((s, s), bool))
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def softmax_attention(q, k, v, segment_ids=None, temperature=1.0, rounding=identity):
    """Returns `softmax(q kᵀ/(τ√D)) v`."""
    weights = rounding(softmax_weights(q, k, segment_ids, temperature))
    v = np.repeat(np.asarray(v, np.float64), q.shape[2] // v.shape[2], axis=2)
    return rounding(_sums(weights, v))


def decode(q, k, v, beta, cached_k, cached_y, length, lucid, temperature=1.0, rounding=identity):
    """Returns `o [B,H,D]` and `y [B,K,D]` of a new token after `length[b]` cached `[B,K,P,D]`."""
    arrays = q, k, v, beta, cached_k, cached_y
    q, k, v, beta, cached_k, cached_y = (np.asarray(x, np.float64) for x in arrays)
    o, y, group, root = np.empty(q.shape), v.copy(), q.shape[1] // k.shape[1], np.sqrt(q.shape[2])
    for b, h in np.ndindex(*k.shape[:2]):
        keys, values = (x[b, h, : length[b]] for x in (cached_k, cached_y))
        keys = np.concatenate([keys, k[b, h][None]])
        if lucid:
            norm = np.linalg.norm(keys, axis=1)
            cosine = keys[:-1] @ keys[-1] / np.where(norm == 0, 1, norm)[:-1]
            a = np.exp(root * (cosine / (norm[-1] or 1) - 1))
            y[b, h] = rounding(beta[b, h] * (v[b, h] - rounding(a) @ values))
        heads = slice(h * group, (h + 1) * group)
        logits = q[b, heads] @ keys.T / (root * temperature)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights = rounding(weights / weights.sum(1, keepdims=True))
        o[b, heads] = weights @ np.concatenate([values, y[b, h][None]])
    return rounding(o), y


def softmax_attention_gradients(
    q, k, v, o_bar, segment_ids=None, temperature=1.0, rounding=identity
):
    """Returns the cotangents by name, and the norms of `q̄` and `k̄` before a cancellation.

    A subtraction makes the rows of the logits' cotangent sum to zero. For identical keys `q̄` is
    only the rounding error of that subtraction. The error of a finite precision is therefore
    relative to the norms without the subtrahend.
    """
    scale = 1 / (np.sqrt(q.shape[-1]) * temperature)
    weights = softmax_weights(q, k, segment_ids, temperature)
    q, k, v, o_bar = (np.asarray(x, np.float64) for x in (q, k, v, o_bar))
    group = q.shape[2] // k.shape[2]
    k_all = np.repeat(k, group, axis=2)

    def of_logits(logits_bar):
        k_bar = _sums(logits_bar.swapaxes(2, 3), q)
        return {"q": _sums(logits_bar, k_all), "k": _per_kv_head(k_bar, group)}

    v_bar, logits_bar, before = _softmax_gradients(weights, v, o_bar, rounding)
    sizes = {name: np.linalg.norm(x) for name, x in of_logits(scale * before).items()}
    return of_logits(rounding(scale * logits_bar)) | {"v": v_bar}, sizes


def _per_kv_head(x, group):
    b, s, h, d = x.shape
    return x.reshape(b, s, h // group, group, d).sum(3)


def _softmax_gradients(exact, v, o_bar, rounding):
    """Returns the cotangents of `v` and of the logits, and the latter before the subtraction."""
    group = o_bar.shape[2] // v.shape[2]
    weights, v_all = rounding(exact), np.repeat(v, group, axis=2)
    weights_bar = _products(o_bar, v_all)
    o = rounding(_sums(weights, v_all))
    delta = np.einsum("bihd,bihd->bhi", o, o_bar)[..., None]
    v_bar = _per_kv_head(_sums(weights.swapaxes(2, 3), o_bar), group)
    return v_bar, exact * (weights_bar - delta), exact * weights_bar


def path_precondition(k, v, w, beta, y_bar, segment_ids=None, rounding=identity):
    """Returns `y` of LUCID-PaTH, the cotangents by name, and scales as of the other gradients."""
    k_hat, norm = normalized_keys(k)
    d = k.shape[-1]
    scores = PathScores(k_hat, k_hat, w, beta, segment_ids, rounding)
    a = rounding(_gram_of_scores(scores.values, d, segment_ids))
    y = rounding(_solve(a, np.asarray(v, np.float64), transposed=False))
    v_bar = rounding(_solve(a, np.asarray(y_bar, np.float64), transposed=True))
    scores_bar = rounding(-np.tril(a, -1) * _products(v_bar, y)) / np.sqrt(d)
    found, sizes = scores.gradients(scores_bar)
    of_rows, of_columns = (
        _normalization_gradient(k_hat / np.sqrt(d), norm, np.sqrt(d) * found.pop(name))
        for name in ("q", "k")
    )
    gradients = {"k": of_rows[0] + of_columns[0], "v": v_bar, **found}
    return y, gradients, {"k": of_rows[1] + of_columns[1], **sizes}


def path_attention(q, k, v, w, beta, o_bar, segment_ids=None, rounding=identity):
    """Returns `o` of PaTH attention, the cotangents by name, and scales."""
    scores, scale = PathScores(q, k, w, beta, segment_ids, rounding), 1 / np.sqrt(q.shape[-1])
    weights = _causal_softmax(scale * scores.values, segment_ids)
    v, o_bar = np.asarray(v, np.float64), np.asarray(o_bar, np.float64)
    o = rounding(_sums(rounding(weights), np.repeat(v, q.shape[2] // v.shape[2], axis=2)))
    v_bar, logits_bar, before = _softmax_gradients(weights, v, o_bar, rounding)
    gradients, _ = scores.gradients(rounding(scale * logits_bar))
    before, sizes = scores.gradients(scale * before)
    sizes |= {name: np.linalg.norm(before[name]) for name in ("q", "k")}
    return o, gradients | {"v": v_bar}, sizes


def _differential(q, k, v, weight, scale, segment_ids, layer, eps):
    """Yields each pair's heads and arrays: maps, values, difference, root mean square, factor."""
    first = 0.8 - 0.6 * np.exp(-0.3 * layer)
    for pair in range(q.shape[2] // 2):
        j = 2 * (pair // (q.shape[2] // k.shape[2]))
        queries, keys = slice(2 * pair, 2 * pair + 2), slice(j, j + 2)
        maps = softmax_weights(q[:, :, queries], k[:, :, keys], segment_ids)
        values = np.concatenate([v[:, :, j], v[:, :, j + 1]], -1)
        difference = (maps[:, 0] - (weight + first) * maps[:, 1]) @ values
        root = np.sqrt((difference**2).mean(-1, keepdims=True) + eps)
        yield queries, keys, maps, values, difference, root, (1 - first) * scale


def differential_attention(q, k, v, weight, scale, segment_ids=None, layer=0, eps=1e-5):
    """Returns `o [B,S,H,D]` of arXiv 2410.05258, with `weight = λ − λ₀` and `layer` from 0."""
    o = np.empty(q.shape)
    arguments = q, k, v, weight, scale, segment_ids, layer, eps
    for queries, _, _, _, difference, root, factor in _differential(*arguments):
        o[:, :, queries] = (factor * difference / root).reshape(*q.shape[:2], 2, -1)
    return o


def differential_attention_gradients(
    q, k, v, weight, scale, o_bar, segment_ids=None, layer=0, eps=1e-5
):
    """Returns the cotangents by name."""
    first, d = 0.8 - 0.6 * np.exp(-0.3 * layer), q.shape[-1]
    bars = {n: np.zeros(x.shape) for n, x in (("q", q), ("k", k), ("v", v), ("scale", scale))}
    bars["weight"] = 0.0
    arguments = q, k, v, weight, scale, segment_ids, layer, eps
    for queries, keys, maps, values, difference, root, factor in _differential(*arguments):
        normed, out_bar = difference / root, o_bar[:, :, queries].reshape(*q.shape[:2], -1)
        bars["scale"] += (1 - first) * (out_bar * normed).sum((0, 1))
        normed_bar = factor * out_bar
        along = (normed_bar * normed).mean(-1, keepdims=True)
        difference_bar = (normed_bar - normed * along) / root
        map_bar = difference_bar @ values.swapaxes(1, 2)
        bars["weight"] -= (map_bar * maps[:, 1]).sum()
        coefficients = np.array([1, -(weight + first)])[:, None, None]
        mixed = (coefficients * maps).sum(1)
        values_bar = mixed.swapaxes(1, 2) @ difference_bar
        bars["v"][:, :, keys] += values_bar.reshape(*v.shape[:2], 2, d)
        maps_bar = coefficients * map_bar[:, None]
        logits_bar = maps * (maps_bar - (maps * maps_bar).sum(-1, keepdims=True)) / np.sqrt(d)
        bars["q"][:, :, queries] = _sums(logits_bar, k[:, :, keys])
        bars["k"][:, :, keys] += _sums(logits_bar.swapaxes(2, 3), q[:, :, queries])
    return bars


def short_convolution(x, taps, before, o_bar, segment_ids=None):
    """Returns `o [B,T,K,D]`, and the cotangents of `x`, `taps` and `before` by name."""
    width, earlier = taps.shape[0], before.shape[1]
    tokens = np.concatenate([before, x], 1)
    o, bars = np.zeros(x.shape), {"tokens": np.zeros(tokens.shape), "taps": np.zeros(taps.shape)}
    for b, t, w in np.ndindex(x.shape[0], x.shape[1], width):
        read = t - (width - 1 - w)
        if segment_ids is not None and (read < 0 or segment_ids[b, read] != segment_ids[b, t]):
            continue
        o[b, t] += taps[w] * tokens[b, earlier + read]
        bars["tokens"][b, earlier + read] += taps[w] * o_bar[b, t]
        bars["taps"][w] += o_bar[b, t] * tokens[b, earlier + read]
    before_bar, x_bar = np.split(bars["tokens"], [earlier], 1)
    return o, {"x": x_bar, "taps": bars["taps"], "before": before_bar}
