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
    zero = (k_hat == 0).all(-1, keepdims=True)
    along = (k_hat * k_hat_bar).sum(-1, keepdims=True) / d
    scale = np.where(zero, 0.0, np.sqrt(d) / norm)
    k_bar = scale * (k_hat_bar - k_hat * along)
    return {"k": k_bar, "v": v_bar, "beta": beta_bar}, np.linalg.norm(scale * k_hat_bar)


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
