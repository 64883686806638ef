"""Fixtures of several files."""

import pytest

from lucid_jax.ops.attention import api, cudnn, xla


@pytest.fixture
def library(monkeypatch):
    """Puts an attention for whole sequences of even length in cuDNN's place, on any device."""

    def unsupported(q, segment_ids, precision):
        return "odd" if q.shape[1] % 2 else None

    monkeypatch.setattr(cudnn, "unsupported", unsupported)
    monkeypatch.setitem(api._BACKENDS, "cudnn", api.Backend(xla.attention))
