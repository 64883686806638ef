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
    s, d = k_hat.shape[1], k_hat.shape[-1]
    a = np.tril(np.exp(_products(k_hat, k_hat) / np.sqrt(d) - np.sqrt(d)), -1)
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        a = a * (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return a + np.eye(s)


def _solve(a, rhs, transposed):
    """Solves `A x = rhs` or `Aᵀ x = rhs` for each head; `rhs` and `x` are `[B,S,K,D]`."""
    x = np.empty(rhs.shape)
    for b in range(rhs.shape[0]):
        for h in range(rhs.shape[2]):
            x[b, :, h] = scipy.linalg.solve_triangular(
                a[b, h], rhs[b, :, h], trans=int(transposed), lower=True, unit_diagonal=True
            )
    return x


def precondition(k, v, segment_ids=None, rounding=identity):
    """Returns `y = A⁻¹ v`."""
    k_hat, _ = normalized_keys(k)
    a = rounding(gram(rounding(k_hat), segment_ids))
    return rounding(_solve(a, np.asarray(v, np.float64), transposed=False))


def precondition_gradients(k, v, y_bar, segment_ids=None, rounding=identity):
    """Returns the cotangents of `k` and `v` by name, and the norm of `k̄` before its projection.

    The last step of `k̄` removes its component along `k̂`. For nearly parallel keys that is almost
    all of it, and for identical keys all of it. The error of a finite precision is therefore
    relative to the norm before this step.
    """
    k_hat, norm = normalized_keys(k)
    d = k_hat.shape[-1]
    a = rounding(gram(rounding(k_hat), segment_ids))
    y = rounding(_solve(a, np.asarray(v, np.float64), transposed=False))
    v_bar = rounding(_solve(a, np.asarray(y_bar, np.float64), transposed=True))
    w = rounding(-np.tril(a, -1) * _products(v_bar, y))
    k_hat_bar = _sums(w + w.swapaxes(2, 3), rounding(k_hat)) / np.sqrt(d)
    zero = (k_hat == 0).all(-1, keepdims=True)
    along = (k_hat * k_hat_bar).sum(-1, keepdims=True) / d
    scale = np.where(zero, 0.0, np.sqrt(d) / norm)
    k_bar = scale * (k_hat_bar - k_hat * along)
    return {"k": k_bar, "v": v_bar}, np.linalg.norm(scale * k_hat_bar)


def softmax_weights(q, k, segment_ids=None, temperature=1.0):
    """Returns the softmax weights `[B,H,S,S]`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s, d = q.shape[1], q.shape[-1]
    logits = _products(q, k) / (np.sqrt(d) * temperature)
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


def decode(q, k, v, cached_k, cached_y, length, lucid, temperature=1.0, rounding=identity):
    """Returns `o [B,H,D]` and `y [B,K,D]` of a new token after `length[b]` cached `[B,K,P,D]`."""
    q, k, v, cached_k, cached_y = (np.asarray(x, np.float64) for x in (q, k, v, cached_k, cached_y))
    o, y, group, root = np.empty(q.shape), v.copy(), q.shape[1] // k.shape[1], np.sqrt(q.shape[2])
    for b, h in np.ndindex(*k.shape[:2]):
        keys, values = (x[b, h, : length[b]] for x in (cached_k, cached_y))
        keys = np.concatenate([keys, k[b, h][None]])
        if lucid:
            norm = np.linalg.norm(keys, axis=1)
            cosine = keys[:-1] @ keys[-1] / np.where(norm == 0, 1, norm)[:-1]
            a = np.exp(root * (cosine / (norm[-1] or 1) - 1))
            y[b, h] = rounding(v[b, h] - rounding(a) @ values)
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
    group = q.shape[2] // k.shape[2]
    scale = 1 / (np.sqrt(q.shape[-1]) * temperature)
    exact = softmax_weights(q, k, segment_ids, temperature)
    weights = rounding(exact)
    q, k, v, o_bar = (np.asarray(x, np.float64) for x in (q, k, v, o_bar))
    k_all, v_all = (np.repeat(x, group, axis=2) for x in (k, v))
    weights_bar = _products(o_bar, v_all)
    o = rounding(_sums(weights, v_all))
    delta = np.einsum("bihd,bihd->bhi", o, o_bar)[..., None]
    logits_bar = rounding(scale * exact * (weights_bar - delta))

    def per_kv_head(x):
        b, s, h, d = x.shape
        return x.reshape(b, s, h // group, group, d).sum(3)

    def of_logits(logits_bar):
        return {
            "q": _sums(logits_bar, k_all),
            "k": per_kv_head(_sums(logits_bar.swapaxes(2, 3), q)),
        }

    v_bar = per_kv_head(_sums(weights.swapaxes(2, 3), o_bar))
    before = of_logits(scale * exact * weights_bar)
    sizes = {name: np.linalg.norm(x) for name, x in before.items()}
    return of_logits(logits_bar) | {"v": v_bar}, sizes


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
