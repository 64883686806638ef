"""The configuration of a run: frozen dataclasses, the only place with defaults.

A file under `configs/` is a plain `ml_collections.ConfigDict` that starts from
`configs.common.base()` (every field below, at its default) and changes what
its run needs. `Config.from_dict` turns it into the dataclasses here, checks
names, types and values, and raises `ConfigError` with one clear line.

Axis legend: the same letters in every einsum, docstring and error.

    B  batch                      L  layers
    T  query length               E  model width
    S  key length                 F  MLP width
    H  query heads                V  vocabulary
    K  key/value heads            N  number of blocks of rows
    G  query heads per K (H/K)    R  rows of a block
    D  head width                 C  columns of a panel of blocks
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

ATTENTION_KINDS = ("lucid", "softmax")
ROPE_SCALINGS = ("none", "linear", "ntk", "llama3")
REMAT_POLICIES = ("none", "dots", "attention", "full")
COMPUTE_DTYPES = ("float32", "bfloat16")
PACKINGS = ("pack", "document")
IMPLEMENTATIONS = ("auto", "reference", "xla", "triton", "mosaic_tpu")
MESH_AXES = ("data", "fsdp", "tensor", "context")


class ConfigError(ValueError):
    """A configuration that cannot run: the message is one line for the user."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{field} must be one of {', '.join(allowed)}; got {value!r}")


def _require_positive(config: object, section: str, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value > 0, f"{section}.{field} must be positive; got {value}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. The defaults are the 1B model of the paper."""

    vocab_size: int = 32000
    num_layers: int = 22
    embed_dim: int = 2048
    mlp_dim: int = 5632
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 64
    # One kind for all layers, or a comma-separated pattern repeated over depth:
    # "softmax,softmax,softmax,lucid" makes every fourth layer a LUCID layer.
    attention: str = "lucid"
    # Divides the logits of the softmax layers (1 is ordinary attention).
    temperature: float = 1.0
    # Of the preconditioning: "auto" takes the best for the device, a name runs that or fails.
    # "reference" and "xla" name the softmax part too, which otherwise takes the best library.
    implementation: str = "auto"
    rope_base: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    # The length the base model was trained at; used by rope_scaling="llama3".
    rope_original_length: int = 2048
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    compute_dtype: str = "bfloat16"
    # What the backward pass finds of a layer beside its input; the rest is computed again:
    # everything ("none"), the results of products with parameters and of the attention
    # ("dots"), those of the attention ("attention"), nothing ("full").
    remat: str = "full"

    def __post_init__(self):
        _require_positive(
            self, "model", "vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads",
            "num_kv_heads", "head_dim", "temperature", "rope_base", "rope_factor",
            "rope_original_length", "norm_eps", "init_std",
        )  # fmt: skip
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads"
            f" ({self.num_kv_heads})",
        )
        _require(self.head_dim % 2 == 0, f"model.head_dim must be even; got {self.head_dim}")
        _require(
            self.rope_scaling != "ntk" or self.head_dim > 2,
            f"model.rope_scaling='ntk' needs model.head_dim above 2; got {self.head_dim}",
        )
        for kind in self.attention.split(","):
            _require_one_of("model.attention (each entry)", kind, ATTENTION_KINDS)
        _require_one_of("model.rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        _require(
            self.rope_scaling != "none" or self.rope_factor == 1.0,
            f"model.rope_factor={self.rope_factor} needs a model.rope_scaling other than 'none'",
        )
        _require_one_of("model.compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _require_one_of("model.remat", self.remat, REMAT_POLICIES)
        _require_one_of("model.implementation", self.implementation, IMPLEMENTATIONS)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The attention kind of every layer, first to last."""
        pattern = self.attention.split(",")
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they fill rows of `sequence_length`.

    `train` and `eval` are weighted mixtures, written `source@weight, source@weight`
    (weight 1 when absent). Weights count documents, not tokens: where those of one
    source are ten times as long, it gives ten times the tokens at the same weight.

    A source is `kind:path` or just a path whose ending tells the kind; commas
    cannot be part of it. Kinds: `text` (a file, or every file under a folder, one
    document a file; a path that ends in a slash is such a folder), `jsonl` and
    `parquet` (one document a row, in the column `text_field`), `arrayrecord`
    (tokens written by `python -m lucid_jax.data.tokenize`) and `python-stdlib`
    (the source text of the running Python's standard library, there on every
    machine).
    """

    train: str = ""
    eval: str = ""
    # "bytes", a `tokenizers` JSON file, or a SentencePiece .model file.
    tokenizer: str = "bytes"
    text_field: str = "text"
    sequence_length: int = 2048
    # "pack" fills rows with several documents; "document" puts one in a row.
    packing: str = "pack"
    # Share of the documents of each source kept out of `train`; an `eval`
    # source of the same path reads exactly these. 0 keeps nothing out.
    holdout: float = 0.0
    # The stream is cut into this many independent shards whatever the number of
    # processes, so that a run resumes on another one. 0: the largest
    # divisor of the batch size that is at most 16.
    shards: int = 0
    read_threads: int = 1

    def __post_init__(self):
        _require_positive(self, "data", "sequence_length", "read_threads")
        _require_one_of("data.packing", self.packing, PACKINGS)
        _require(0 <= self.holdout < 1, f"data.holdout must be in [0, 1); got {self.holdout}")
        _require(self.shards >= 0, f"data.shards must be 0 or more; got {self.shards}")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay.

    The paper's pretraining says `learning_rate`, `warmup`, `b2`, `eps` and
    `weight_decay`; `final_ratio`, `b1` and `clip_norm` are the usual values, our choice.
    """

    learning_rate: float = 5e-4
    # Share of the steps spent warming up, and the last rate over the peak rate.
    warmup: float = 0.06
    final_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-12
    weight_decay: float = 0.01
    # Global gradient norm above which gradients are scaled down; 0 switches it off.
    clip_norm: float = 1.0

    def __post_init__(self):
        _require_positive(self, "optim", "learning_rate", "eps")
        for field in ("warmup", "final_ratio"):
            value = getattr(self, field)
            _require(0 <= value <= 1, f"optim.{field} must be in [0, 1]; got {value}")
        for field in ("b1", "b2"):
            value = getattr(self, field)
            _require(0 <= value < 1, f"optim.{field} must be in [0, 1); got {value}")
        for field in ("weight_decay", "clip_norm"):
            value = getattr(self, field)
            _require(value >= 0, f"optim.{field} must be 0 or more; got {value}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, what a new run starts from."""

    every: int = 1000
    keep_last: int = 3
    # Beside the last ones, this many of the lowest evaluation loss.
    keep_best: int = 1
    # A work directory (its newest checkpoint) or a checkpoint step directory
    # whose parameters a new run starts from: fine-tuning. Optimiser and data start anew.
    init_from: str = ""

    def __post_init__(self):
        _require_positive(self, "checkpoint", "every", "keep_last")
        _require(
            self.keep_best >= 0, f"checkpoint.keep_best must be 0 or more; got {self.keep_best}"
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1: whatever is left.

    `data` replicates parameters, `fsdp` shards them, `tensor` shards heads and
    MLP columns, `context` shards the tokens of a row.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    # Tokens of a block of a row: blocks are dealt to the devices of `context` in turn, and
    # rows padded to whole rounds. The kernels take multiples of 128.
    stripe: int = 256

    def __post_init__(self):
        _require_positive(self, "mesh", "stripe")
        sizes = self.sizes
        _require(
            all(n == -1 or n >= 1 for n in sizes) and sizes.count(-1) <= 1,
            f"mesh axes must be positive with at most one -1; got {dict(zip(MESH_AXES, sizes))}",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of `MESH_AXES`."""
        return tuple(getattr(self, axis) for axis in MESH_AXES)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Lengths are in optimiser steps, sizes in rows of a global batch."""

    steps: int = 100_000
    batch_size: int = 256
    # Micro-batches a step is cut into, to bound activation memory.
    accumulation: int = 1
    seed: int = 0
    # Tokens of a row whose logits exist at one time.
    loss_chunk: int = 512
    log_every: int = 10
    eval_every: int = 1000
    eval_batches: int = 50
    # Telemetry of every LUCID layer (largest off-diagonal of A, |y|/|v|) at log steps.
    telemetry: bool = True
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        _require_positive(
            self, "config", "steps", "batch_size", "accumulation", "loss_chunk", "log_every",
            "eval_every", "eval_batches",
        )  # fmt: skip
        _require(
            self.batch_size % self.accumulation == 0,
            f"batch_size ({self.batch_size}) must be a multiple of accumulation"
            f" ({self.accumulation})",
        )
        saves = self.checkpoint.every
        # Else few checkpoints, or none, would have an evaluation loss to be best by.
        _require(
            not (self.checkpoint.keep_best and self.data.eval)
            or self.eval_every % saves == 0
            or saves % self.eval_every == 0,
            f"one of eval_every ({self.eval_every}) and checkpoint.every ({saves}) must be a"
            " multiple of the other, or checkpoint.keep_best 0",
        )
        shards = self.data.shards
        _require(
            shards == 0 or self.batch_size % shards == 0,
            f"batch_size ({self.batch_size}) must be a multiple of data.shards ({shards})",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Builds a checked configuration from nested mappings.

        Raises:
          ConfigError: an unknown key (with the nearest known one), a value of the
            wrong type, or values that no run can have.
        """
        return _build(cls, values, prefix="")

    def to_dict(self) -> dict[str, Any]:
        """The nested plain values that `from_dict` reads."""
        return dataclasses.asdict(self)

    def changes_since(self, earlier: Config) -> dict[str, tuple[Any, Any]]:
        """The earlier and the present value of every dotted key that differs."""
        before, now = _flatten(earlier.to_dict()), _flatten(self.to_dict())
        return {key: (before[key], now[key]) for key in now if now[key] != before[key]}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"unknown config key {prefix}{key}{hint}")
        arguments[key] = _convert(hints[key], value, prefix + key)
    return cls(**arguments)


def _convert(kind: type, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"{name} must be a section of keys; got {value!r}")
        return _build(kind, value, prefix=f"{name}.")
    assert not isinstance(kind, types.UnionType), name
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {kind.__name__}; got {value!r}")
    return value
