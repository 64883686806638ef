"""A model and a corpus small enough to train in seconds, and helpers to run and compare them."""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from jax.experimental.compilation_cache import compilation_cache

from lucid_jax.checkpoint.manager import Checkpointer, checkpoint_directory, save_params
from lucid_jax.config import CheckpointConfig, Config
from lucid_jax.evaluate import checkpoint as evaluate_checkpoint
from lucid_jax.evaluate import loss as evaluate_loss
from lucid_jax.evaluate import run_tasks
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.training import loop, sweep
from lucid_jax.training.step import Trainer
from lucid_jax.training.writer import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
# Metrics that differ between two runs of the same configuration.
_CLOCK = ("tokens_per_second", "mfu", "seconds_left")
_WORDS = ["lower", "triangle", "keys", "rows", "of", "a", "causal", "solve", "ünïcode"]


def train_bpe(path, lines, vocab_size, special_tokens=("<s>", "</s>")):
    """Trains a BPE tokenizer on `lines` and writes it to `path`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(path))


def write_corpus(directory: pathlib.Path) -> str:
    """Writes forty documents of 1 to 12 words, several to a sequence; returns the source."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(_WORDS, size=rng.integers(1, 13))
        (directory / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
    return f"text:{directory}"


def toy_config(corpus: str, **overrides) -> Config:
    """Returns a model of one softmax and one LUCID layer, width 32, on sequences of 64 bytes.

    `overrides` replace fields of the configuration; those of a section are given as a mapping.
    """
    values = {
        "steps": 20,
        "batch_size": 8,
        "log_every": 1,
        "eval_every": 8,
        "eval_batches": 1,
        "model": {
            "vocab_size": 258, "num_layers": 2, "embed_dim": 32, "mlp_dim": 64, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 8, "attention": "softmax,lucid",
            "compute_dtype": "float32", "remat": "none",
        },
        "data": {"train": corpus, "eval": corpus, "sequence_length": 64},
        "optim": {"learning_rate": 1e-2, "b2": 0.95, "eps": 1e-8},
        "checkpoint": {"every": 4},
    }  # fmt: skip
    for name, value in overrides.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return Config.from_dict(values)


def use_devices(monkeypatch, count: int) -> None:
    """Makes training and evaluation in this process use `count` of its devices."""
    for module in (loop, sweep, evaluate_checkpoint, run_tasks):
        monkeypatch.setattr(
            module, "make_layout", lambda config: make_layout(config, jax.devices()[:count])
        )


def model_of(config: Config, devices: int = 1) -> LanguageModel:
    """Builds the model of a configuration on the first devices."""
    return LanguageModel.build(config.model, make_layout(config, jax.devices()[:devices]))


def save_random(directory: pathlib.Path, config: Config, step: int = 4) -> Any:
    """Makes a work directory with a checkpoint of random parameters; returns these."""
    params = model_of(config).init(seed=0)
    save_params(directory, config, step, params)
    return params


def log_probabilities(config: Config, params: Any, size: int) -> Callable[[list[int]], np.ndarray]:
    """Returns a function from S ≤ `size` tokens to log probabilities of the next, `[S,V]` float64.

    It runs the whole model once, at one shape.
    """
    model = model_of(config)
    run = jax.jit(lambda *arguments: model.merge(params)(*arguments, None)[0])
    head = np.asarray(model.merge(params).head, np.float64)

    def compute(tokens: list[int]) -> np.ndarray:
        # The model is causal, so the padding changes nothing.
        padded = np.pad(tokens, (0, size - len(tokens)))[None]
        x = run(padded, np.arange(size)[None])[0, : len(tokens)]
        logits = np.asarray(x, np.float64) @ head
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return compute


def stop_after(monkeypatch, step: int, polls: int = 0) -> None:
    """Makes training in this process stop at `step`, as after SIGTERM.

    `Preemption.requested` answers no the first `polls` times at that step: it is polled once
    after the step, and once before each batch of an evaluation.
    """
    polled = []

    def requested(self, done):
        polled.append(done)
        return polled.count(step) > polls

    monkeypatch.setattr(loop.Preemption, "requested", requested)


def _once(make: Callable) -> Callable:
    """Caches the functions that `make` returns by its arguments."""
    cached = functools.cache(make)
    return lambda *args: cached(*(tuple(x) if isinstance(x, list) else x for x in args))


@contextlib.contextmanager
def cached_compilation(directory: pathlib.Path):
    """Compiles a program once for all tests, and traces it once for each configuration."""
    # JAX decides once in a process whether it has a cache, hence the resets.
    old = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in (
                (Trainer, "make_step"),
                (evaluate_loss, "_make_eval_step"),
            ):
                patch.setattr(module, name, _once(getattr(module, name)))
            yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", old)
        compilation_cache.reset_cache()


# Runs of the command line.


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process that shares the compilation cache of this one."""
    cache = jax.config.jax_compilation_cache_dir or ""
    # As in conftest.py, but for the number of devices.
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def write_config(path: pathlib.Path, config: Config) -> pathlib.Path:
    """Writes a configuration file for run.py."""
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    return path


def free_port() -> int:
    """Returns a port that no process listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """Starts run.py."""
    return subprocess.Popen(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 600, code: int = 0) -> str:
    """Waits for a process to end with an exit code; returns its standard output."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out


def until(process: subprocess.Popen, condition: Callable[[], bool], timeout: float = 300) -> None:
    """Waits until `condition` holds or the process has ended."""
    limit = time.monotonic() + timeout
    while process.poll() is None and not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


# Results of runs.


def newest_step(workdir: pathlib.Path) -> int:
    """Returns the step of the newest checkpoint, 0 if there is none."""
    directory = pathlib.Path(checkpoint_directory(workdir))
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def saved_state(workdir: pathlib.Path, config: Config) -> dict[str, np.ndarray]:
    """Restores the newest checkpoint from a copy; returns its arrays by name."""
    step = str(newest_step(workdir))
    copy = workdir.with_name(f"{workdir.name}.copy")
    shutil.copytree(checkpoint_directory(workdir) / step, copy / step)
    try:
        with Checkpointer(copy, CheckpointConfig()) as checkpointer:
            trainer = Trainer.build(config, model_of(config))
            restored = checkpointer.restore_latest(trainer.abstract_state)
    finally:
        shutil.rmtree(copy)
    assert restored is not None
    return named(restored.state)


def named(tree) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by name."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compares every leaf bit by bit."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        assert actual[name].tobytes() == x.tobytes(), name


def assert_close(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    """Compares every leaf; the tolerance is relative to its largest entry."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        worst = np.abs(np.subtract(actual[name], x, dtype=np.float64)).max(initial=0)
        assert worst <= tolerance * np.abs(x).max(initial=0), f"{name}: off by {worst}"


def curve(workdir: pathlib.Path) -> list[dict]:
    """Returns the lines of `metrics.jsonl` without the metrics that depend on the clock."""
    return [
        {name: x for name, x in line.items() if name not in _CLOCK}
        for line in read_metrics(workdir)
    ]


def assert_close_curves(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Compares every line of the metrics of two runs, up to rounding."""
    for line, expected in zip(curve(workdir), curve(other), strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), name
