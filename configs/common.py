"""The base of every configuration, and its variants by size."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from lucid_jax.config import Config, ConfigError


def base() -> ConfigDict:
    """Returns every field at its default; `lucid_jax/config.py` explains them."""
    # `Config.from_dict` checks types, and takes 1e3 for 1000.
    return ConfigDict(Config().to_dict(), type_safe=False)


def at_size(
    config: ConfigDict, size: str, slices: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> ConfigDict:
    """Fits a configuration to a size, in place, and returns it.

    Args:
      config: the run.
      size: the text after the colon of `--config=file.py:size`: "full" changes nothing, "smoke"
        runs in seconds on a CPU, any other names one of `slices`.
      slices: by TPU slice or GPUs, the sizes of mesh axes to set, and "accumulation" or "remat"
        (of the model) where they change.
    """
    if size == "smoke":
        _smoke(config)
    elif size in slices:
        changes = dict(slices[size])
        config.accumulation = changes.pop("accumulation", config.accumulation)
        config.model.remat = changes.pop("remat", config.model.remat)
        config.mesh.update(changes)
    elif size != "full":
        known = ", ".join(("full", "smoke", *slices))
        raise ConfigError(f"the text after the colon must be one of {known}; got {size!r}")
    return config


def _smoke(config: ConfigDict) -> None:
    """Shrinks a run to a toy size and data, with the same code and other settings.

    The batch and the width divide by 1, 2, 3, 4, 6 and 8 devices, because `mesh.fsdp` shards
    them over all devices by default.
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
