"""What every configuration starts from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from lucid_jax.config import Config, ConfigError


def base() -> ConfigDict:
    """Every field at its default; see `lucid_jax/config.py` for what each one means."""
    return ConfigDict(Config().to_dict())


def at_size(
    config: ConfigDict, size: str, slices: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> ConfigDict:
    """The configuration as it is ("full"), on a TPU slice, or in seconds on a CPU ("smoke").

    Args:
      config: Of the run.
      size: The text after the colon.
      slices: What is changed on each slice: the mesh, and by `remat` what is kept.
    """
    if size == "smoke":
        _smoke(config)
    elif size in slices:
        changes = dict(slices[size])
        config.model.remat = changes.pop("remat", config.model.remat)
        config.mesh.update(changes)
    elif size != "full":
        known = ", ".join(("full", "smoke", *slices))
        raise ConfigError(f"the text after the colon must be one of {known}; got {size!r}")
    return config


def _smoke(config: ConfigDict) -> None:
    """The same code and settings, a toy size and data.

    Rows and width divide by 1, 2, 3, 4, 6 and 8 devices, as `mesh.fsdp` cuts them by default.
    """
    config.update(steps=4, batch_size=24, accumulation=1, log_every=1, eval_every=4, eval_batches=1)
    config.model.update(
        vocab_size=258, num_layers=2, embed_dim=96, mlp_dim=128, num_heads=4, num_kv_heads=2,
        head_dim=16, compute_dtype="float32",
    )  # fmt: skip
    config.data.update(
        train="python-stdlib", eval="python-stdlib", tokenizer="bytes", holdout=0.05,
        sequence_length=128,
    )  # fmt: skip
    config.checkpoint.update(every=4, init_from="")
    config.mesh.update(context=1, stripe=16)
