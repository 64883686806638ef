"""Checkpoints in a bucket are read by the library of its scheme, which has to be there."""

import sys

import pytest

from lucid_jax.checkpoint.restore import restore_params
from lucid_jax.config import ConfigError


@pytest.mark.parametrize(("scheme", "library"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_bucket_whose_library_is_missing_is_named(scheme, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"^{scheme}://b/run cannot be read: .*nstall {library}"):
        restore_params(f"{scheme}://b/run", {})
