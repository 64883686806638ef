"""The configuration of a run: frozen dataclasses, the only place with defaults.

A file under `configs/` is a plain `ml_collections.ConfigDict`: it starts from
`configs.common.base()`, which has every field below at its default, and changes what its
run needs. `Config.from_dict` turns it into the dataclasses here and checks names, types
and values.

Axis legend: the same letters in every einsum, docstring and error.

    B  batch                      L  layers
    T  query length               E  model width
    S  key length                 F  MLP width
    H  query heads                V  vocabulary
    K  key/value heads            N  number of blocks of rows
    G  query heads per K (H/K)    R  rows of a block
    D  head width                 C  columns of a panel of blocks
"""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

ATTENTION_KINDS = ("lucid", "softmax", "differential")
POSITIONS = ("rope", "none", "path")
QK_NORMS = ("none", "paper", "rms")
ROPE_SCALINGS = ("none", "linear", "ntk", "llama3")
REMAT_POLICIES = ("none", "dots", "attention", "full")
COMPUTE_DTYPES = ("float32", "bfloat16")
PACKINGS = ("pack", "document")
SCHEDULES = ("cosine", "constant", "wsd")
BAD_LINE_ACTIONS = ("skip", "fail")
IMPLEMENTATIONS = ("auto", "reference", "xla", "triton", "mosaic_gpu", "mosaic_tpu")
MESH_AXES = ("data", "fsdp", "tensor", "context")


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line for the user."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{field} must be one of {', '.join(allowed)}; got {value!r}")


_RANGES: dict[str, Callable[[float], bool]] = {
    "positive": lambda x: x > 0,
    "0 or more": lambda x: x >= 0,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 2^32)": lambda x: 0 <= x < 2**32,
}


def _require_range(expected: str, section: str, config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(_RANGES[expected](value), f"{section}.{field} must be {expected}; got {value}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. The default sizes, `rope_base` and `norm_eps` are TinyLlama's.

    The paper's 1B model differs from them in the width of its heads alone, which is 68.
    """

    # Tokens that the embedding and the output layer know; a tokenizer may have fewer.
    vocab_size: int = 32000
    # Transformer layers.
    num_layers: int = 22
    # Width of the residual stream.
    embed_dim: int = 2048
    # Hidden width of the gated MLP.
    mlp_dim: int = 5632
    # Query heads of a layer.
    num_heads: int = 32
    # Key/value heads of a layer; they divide the query heads.
    num_kv_heads: int = 4
    # Width of a head; even, because RoPE rotates pairs.
    head_dim: int = 64
    # Whether the projections to queries, keys and values have biases, as in Qwen2.5.
    attention_bias: bool = False
    # RMSNorm of every query and key head, before RoPE: "paper" has no learnt scale; "rms" has one
    # for the queries and one for the keys of a layer, 2·D parameters, as in Qwen3.
    qk_norm: str = "none"
    # The attention of the layers: one kind, or a comma-separated pattern repeated over depth.
    # "softmax,softmax,softmax,lucid" makes every fourth layer a LUCID layer. "lucid" and "softmax"
    # have the same parameters. "differential" (arXiv 2410.05258) pairs the heads, and adds 6·D
    # parameters to every layer of the model; its KV cache is twice as large.
    attention: str = "lucid"
    # How queries and keys know their positions: "rope", "none" for causality alone (NoPE), or
    # "path", the data-dependent transitions of PaTH (arXiv 2505.16381). The first two have no
    # parameters; "path" adds E·K·D + 3·K·D + E·K + K to a layer: directions, a convolution over
    # three tokens, and β with its bias. It runs in layers of "softmax" (PaTH) and "lucid"
    # (LUCID-PaTH), and with a `mesh.context` that divides the KV heads which `mesh.tensor` leaves.
    positions: str = "rope"
    # Whether LUCID layers learn β, a number in (0, 1] for each token and KV head: the solution of
    # `A y = v` becomes that of `(diag(1/β) + stril(A)) y = v`. Adds E·K + K parameters to every
    # layer of the model, with which β starts near 0.98.
    lucid_beta: bool = False
    # Divides the logits of the softmax layers; 1 is ordinary attention.
    temperature: float = 1.0
    # The backend of the preconditioning. "auto" takes the best one for the device; a named one
    # runs or fails. "reference" and "xla" also choose the backend of the softmax part, which
    # otherwise takes the best library for the device. With PaTH all of them choose both.
    implementation: str = "auto"
    # Base of RoPE: the longest wavelength is about 2π times as many tokens.
    rope_base: float = 10_000.0
    # How RoPE is stretched to longer contexts: "linear" shrinks all positions, "ntk" grows the
    # base, "llama3" stretches the long wavelengths only (see `ops/rope.py`).
    rope_scaling: str = "none"
    # Longest context over the original one.
    rope_factor: float = 1.0
    # Tokens of the original context; used by "llama3" only.
    rope_original_length: int = 2048
    # Added to the mean square in RMSNorm.
    norm_eps: float = 1e-5
    # Whether the output layer is the transposed embedding.
    tie_embeddings: bool = False
    # Standard deviation of the initial weights.
    init_std: float = 0.02
    # Dtype of activations and matrix products; parameters are float32.
    compute_dtype: str = "bfloat16"
    # What the forward pass of a layer stores for its backward pass, beside the layer's input;
    # the rest is recomputed. "none" stores everything, "dots" the products with parameters and
    # the attention outputs, "attention" the attention outputs, "full" nothing. The default
    # needs the least memory.
    remat: str = "full"

    def __post_init__(self):
        _require_range(
            "positive", "model", self, "vocab_size", "num_layers", "embed_dim", "mlp_dim",
            "num_heads", "num_kv_heads", "head_dim", "temperature", "rope_base", "rope_factor",
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
        _require(
            "differential" not in self.layer_kinds or self.num_kv_heads % 2 == 0,
            f"model.attention='differential' pairs heads, so model.num_kv_heads must be even; got"
            f" {self.num_kv_heads}",
        )
        _require_one_of("model.qk_norm", self.qk_norm, QK_NORMS)
        _require_one_of("model.positions", self.positions, POSITIONS)
        _require(
            self.positions == "rope" or self.rope_scaling == "none",
            f"model.rope_scaling={self.rope_scaling!r} needs model.positions='rope'; got"
            f" {self.positions!r}",
        )
        _require_one_of("model.rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        if self.positions == "path":
            _require(
                "differential" not in self.layer_kinds,
                "model.positions='path' needs a model.attention of lucid and softmax alone; got"
                f" {self.attention!r}",
            )
            _require(
                self.implementation not in ("mosaic_gpu", "mosaic_tpu"),
                "model.positions='path' needs a model.implementation of auto, xla, triton or"
                f" reference; got {self.implementation!r}",
            )
            _require(
                not self.lucid_beta,
                "model.lucid_beta needs model.positions='rope' or 'none'; got 'path'",
            )
        _require(
            not self.lucid_beta or self.implementation != "mosaic_gpu",
            "model.lucid_beta needs another model.implementation; got 'mosaic_gpu'",
        )
        _require(
            not self.lucid_beta or "lucid" in self.layer_kinds,
            f"model.lucid_beta needs a LUCID layer; got model.attention={self.attention!r}",
        )
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
    """The sources of tokens, and how they fill sequences of `sequence_length` tokens.

    `train` and `eval` are weighted mixtures, written `source@weight, source@weight` (weight 1
    when absent). Weights count documents, not tokens: at the same weight, a source whose
    documents are ten times as long gives ten times the tokens.

    A source is `kind:path`, or just a path whose ending tells the kind. A path cannot contain
    a comma. The kinds are

        text          one document a file, in UTF-8
        jsonl         one document a line, under the key `text_field`; a line without it may
                      have a `prompt` and a `completion`, which alone is trained on
        parquet       one document a row, in the column `text_field`
        arrayrecord   tokens written by `python -m lucid_jax.data.tokenize`
        python-stdlib the source code of the running Python's standard library, which is on
                      every machine

    The path is a file, a glob, or a folder, of which all files of the kind are read; without
    `kind:`, a folder's files must be of one kind. Text and jsonl files may end in .gz or .zst;
    such jsonl is decompressed once, into the user's cache folder.
    """

    # The mixture to train on; required for training.
    train: str = ""
    # The mixture to evaluate on; empty means no evaluation.
    eval: str = ""
    # "bytes", a Hugging Face `tokenizers` JSON file, or a SentencePiece model file.
    tokenizer: str = "bytes"
    # The key or column that holds a document's text in jsonl and parquet sources.
    text_field: str = "text"
    # What to do with a document that cannot be read, such as a line that is not JSON or text
    # that is not UTF-8: "skip" leaves it out and counts it, "fail" ends the run. The first
    # document of a file is read at the start, and ends the run there.
    on_bad_line: str = "skip"
    # Tokens of a sequence; the default is the paper's pretraining length.
    sequence_length: int = 2048
    # "pack" fills sequences with several documents; "document" puts one in a sequence.
    packing: str = "pack"
    # Share of each source's documents kept out of `train`; an `eval` source with the same
    # path reads exactly these. 0 keeps nothing out.
    holdout: float = 0.0
    # Independent streams the data is cut into. They do not depend on the number of processes,
    # so a run can resume on another number. 0 means the largest divisor of the batch size
    # that is at most 16.
    shards: int = 0
    # Threads that read and tokenise documents, per shard.
    read_threads: int = 1

    def __post_init__(self):
        _require_range("positive", "data", self, "sequence_length", "read_threads")
        _require_one_of("data.packing", self.packing, PACKINGS)
        _require_one_of("data.on_bad_line", self.on_bad_line, BAD_LINE_ACTIONS)
        _require_range("in [0, 1)", "data", self, "holdout")
        _require_range("0 or more", "data", self, "shards")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up, and a decay of the learning rate.

    `learning_rate`, `warmup`, `b1`, `b2`, `eps` and `weight_decay` are the paper's values for
    pretraining; the others are common values and our choice.
    """

    # Peak learning rate.
    learning_rate: float = 5e-4
    # Share of the steps spent warming up.
    warmup: float = 0.06
    # How the rate goes on from its peak: "cosine" falls to the last step, "constant" stays, "wsd"
    # (warm-up, stable, decay) stays and then falls on a line. All but "constant" end at
    # `final_ratio`. Those that stay let a run be extended without a trace of its first end.
    schedule: str = "cosine"
    # Share of the steps at the end in which "wsd" falls.
    decay: float = 0.2
    # Learning rate at the last step, as a share of the peak.
    final_ratio: float = 0.1
    # Decay of the first moment, per step.
    b1: float = 0.9
    # Decay of the second moment, per step.
    b2: float = 0.99
    # Added to the root of the second moment.
    eps: float = 1e-12
    # Decoupled weight decay, multiplied by the learning rate; norms and biases do not decay.
    weight_decay: float = 0.01
    # Global norm above which gradients are scaled down; 0 switches clipping off.
    clip_norm: float = 1.0
    # Factor of the mean square of log Z, for Z the normaliser of the softmax over the vocabulary,
    # in what training minimises: it keeps logits from drifting (1e-4 in PaLM). Reported losses
    # are without it; 0 switches it off.
    z_loss: float = 0.0

    def __post_init__(self):
        _require_range("positive", "optim", self, "learning_rate", "eps")
        _require_range("0 or more", "optim", self, "weight_decay", "clip_norm", "z_loss")
        _require_range("in [0, 1]", "optim", self, "warmup", "decay", "final_ratio")
        _require_range("in [0, 1)", "optim", self, "b1", "b2")
        _require_one_of("optim.schedule", self.schedule, SCHEDULES)
        _require(
            self.schedule != "wsd" or self.warmup + self.decay <= 1,
            f"optim.warmup ({self.warmup}) and optim.decay ({self.decay}) must add up to 1 at most",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and what a new run starts from."""

    # Optimiser steps between checkpoints.
    every: int = 1000
    # Newest checkpoints to keep; older ones remain to fall back on when the newest is damaged.
    keep_last: int = 3
    # Checkpoints of the lowest evaluation loss to keep in addition.
    keep_best: int = 1
    # A work directory (its newest checkpoint is taken) or one checkpoint's directory, whose
    # parameters a new run starts from, for fine-tuning. Optimiser and data start anew.
    init_from: str = ""

    def __post_init__(self):
        _require_range("positive", "checkpoint", self, "every", "keep_last")
        _require_range("0 or more", "checkpoint", self, "keep_best")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. At most one axis may be -1, which takes the rest."""

    # Replicas of the parameters, each of which takes a share of the batch.
    data: int = 1
    # Shards of the parameters and of the batch.
    fsdp: int = -1
    # Shards of the heads and of the MLP columns.
    tensor: int = 1
    # Shards of the tokens of a sequence.
    context: int = 1
    # Tokens of a block when `context` shards a sequence: blocks are dealt to the shards in
    # turn, and sequences are padded to whole rounds. The kernels need multiples of 128.
    stripe: int = 256

    def __post_init__(self):
        _require_range("positive", "mesh", self, "stripe")
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
    """A whole run. Intervals are in optimiser steps."""

    # Optimiser steps of the run.
    steps: int = 100_000
    # Sequences of a global batch, over all devices and micro-batches.
    batch_size: int = 256
    # Micro-batches of a step, which bound the memory of activations.
    accumulation: int = 1
    # Seed of the initial parameters and of the order of the data.
    seed: int = 0
    # Tokens of a sequence whose logits exist at one time, which bounds their memory.
    loss_chunk: int = 512
    # Steps between logged training metrics.
    log_every: int = 10
    # Steps between evaluations; the default evaluates at every checkpoint.
    eval_every: int = 1000
    # Global batches of an evaluation, at most.
    eval_batches: int = 50
    # Whether logged steps include, for every LUCID layer, the largest off-diagonal entry of A
    # in a sample of 64 rows of each sequence, and the largest ratio |y|/|v| of a head.
    telemetry: bool = True
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        _require_range(
            "positive", "config", self, "steps", "batch_size", "accumulation", "loss_chunk",
            "log_every", "eval_every", "eval_batches",
        )  # fmt: skip
        _require_range("in [0, 2^32)", "config", self, "seed")
        shards, saves = self.data.shards, self.checkpoint.every
        _require(
            self.batch_size % self.accumulation == 0,
            f"batch_size ({self.batch_size}) must be a multiple of accumulation"
            f" ({self.accumulation})",
        )
        _require(
            shards == 0 or self.batch_size % shards == 0,
            f"batch_size ({self.batch_size}) must be a multiple of data.shards ({shards})",
        )
        # Otherwise few checkpoints, or none, would have an evaluation loss to be ranked by.
        _require(
            not (self.checkpoint.keep_best and self.data.eval)
            or self.eval_every % saves == 0
            or saves % self.eval_every == 0,
            f"one of eval_every ({self.eval_every}) and checkpoint.every ({saves}) must be a"
            " multiple of the other, or checkpoint.keep_best 0",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a checked configuration from nested mappings.

        Raises:
          ConfigError: a key is unknown (the message names the nearest known one), a value has
            the wrong type, or no run can have these values.
        """
        return _build(cls, values, prefix="")

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, which `from_dict` reads back."""
        return dataclasses.asdict(self)

    def changes_since(self, earlier: Self) -> dict[str, tuple[Any, Any]]:
        """Returns `{dotted key: (earlier value, present value)}` of the keys that differ."""
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


# What the values of a field meant in records of earlier versions.
_EARLIER_VALUES: dict[str, dict[Any, Any]] = {"model.qk_norm": {False: "none", True: "rms"}}


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
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        value = _EARLIER_VALUES.get(name, {}).get(value, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {kind.__name__}; got {value!r}")
    return value
