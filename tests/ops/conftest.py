"""What a CPU would not do by itself."""

import pytest

from lucid_jax.ops.attention import xla as attention_xla
from lucid_jax.ops.precondition import xla as precondition_xla


@pytest.fixture
def wide_panels(monkeypatch):
    """The panels of an accelerator, of several blocks each; a CPU takes square tiles."""
    for module in (attention_xla, precondition_xla):
        monkeypatch.setattr(module, "panel_width", lambda: 1024)
