"""A model and a corpus small enough to train in seconds, and what runs of it leave behind."""

import contextlib
import functools
import os
import pathlib
import re
import shutil
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

from lucid_jax.checkpoint.manager import Checkpointer, checkpoint_directory
from lucid_jax.config import MESH_AXES, CheckpointConfig, Config
from lucid_jax.evaluate import checkpoint as evaluate_checkpoint
from lucid_jax.evaluate import loss, run_tasks
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.training import loop as train
from lucid_jax.training import sweep
from lucid_jax.training.step import Trainer
from lucid_jax.training.writer import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
# What differs between two runs that do the same.
_CLOCK = ("tokens_per_second", "mfu", "seconds_left")
_WORDS = ["lower", "triangle", "keys", "rows", "of", "a", "causal", "solve", "ünïcode"]


def train_bpe(path, lines, vocab_size):
    """Writes a BPE tokenizer that has learned the pieces of `lines`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(path))


def write_corpus(directory: pathlib.Path) -> str:
    """Forty documents of 1 to 12 words, several to a row; gives the source."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(_WORDS, size=rng.integers(1, 13))
        (directory / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
    return f"text:{directory}"


def toy_config(corpus: str, **overrides) -> Config:
    """A softmax and a LUCID layer of width 32 on rows of 64 bytes, sections as mappings."""
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


def mesh_config(corpus: str, shape: tuple[int, ...], **overrides) -> Config:
    """One that every mesh of eight devices divides, and whose first moments are the gradients."""
    return toy_config(
        corpus,
        # Rows of 64 in stripes of five tokens end in padding wherever devices share them.
        mesh={**dict(zip(MESH_AXES, shape)), "stripe": 5},
        **{
            "model": {"vocab_size": 264, "num_kv_heads": 4, **overrides.pop("model", {})},
            "optim": {"b1": 0.0, "clip_norm": 0.0},
            "telemetry": False,
            **overrides,
        },
    )


def use_devices(monkeypatch, count: int) -> None:
    """Lets training and evaluation in this process see `count` of its devices."""
    for module in (train, sweep, evaluate_checkpoint, run_tasks):
        monkeypatch.setattr(
            module, "make_layout", lambda config: make_layout(config, jax.devices()[:count])
        )


def model_of(config: Config, devices: int = 1) -> LanguageModel:
    """Builds the model of a configuration on the first devices."""
    return LanguageModel.build(config.model, make_layout(config, jax.devices()[:devices]))


def save_random(directory: pathlib.Path, config: Config, step: int = 4) -> Any:
    """Makes a work directory with a checkpoint of random parameters; gives these."""
    params = model_of(config).init(seed=0)
    with Checkpointer(checkpoint_directory(directory), config.checkpoint) as checkpointer:
        state = {"params": params}
        checkpointer.save(step, state, data_state={}, config=config.to_dict(), eval_loss=None)
    return params


def log_probabilities(config: Config, params: Any, size: int) -> Callable[[list[int]], np.ndarray]:
    """From at most `size` tokens to those of the next one after each, float64 `[S,V]`.

    All logits at once, in one shape.
    """
    model = model_of(config)
    run = jax.jit(lambda *arguments: model.merge(params)(*arguments, None)[0])
    head = np.asarray(model.merge(params).head, np.float64)

    def of(tokens: list[int]) -> np.ndarray:
        # No token sees those after it.
        padded = np.pad(tokens, (0, size - len(tokens)))[None]
        x = run(padded, np.arange(size)[None])[0, : len(tokens)]
        logits = np.asarray(x, np.float64) @ head
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return of


def stop_after(monkeypatch, step: int, questions: int = 0) -> None:
    """Asks training in this process to stop at `step`, as SIGTERM would.

    The request comes after so many `questions` about that step: one has been asked when
    its evaluation begins.
    """
    asked = []

    def requested(self, done):
        asked.append(done)
        return asked.count(step) > questions

    monkeypatch.setattr(train.Preemption, "requested", requested)


def _once(make: Callable) -> Callable:
    """`make`, which gives the same function again for the same arguments."""
    cached = functools.cache(make)
    return lambda *args: cached(*(tuple(x) if isinstance(x, list) else x for x in args))


@contextlib.contextmanager
def cached_compilation(directory: pathlib.Path):
    """Compiles what several runs of a session have in common once.

    Of runs of one configuration in this process even tracing is shared.
    """
    # Whether there is a cache is decided once in a process, hence the resets.
    old = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in (
                (Trainer, "make_step"),
                (train, "_make_telemetry"),
                (loss, "_make_eval_step"),
            ):
                patch.setattr(module, name, _once(getattr(module, name)))
            yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", old)
        compilation_cache.reset_cache()


# Runs of the command line.


def environment(devices: int = 1) -> dict[str, str]:
    """That of a process with the compilation cache of this one."""
    cache = jax.config.jax_compilation_cache_dir
    # Those of conftest.py but for the count.
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def write_config(path: pathlib.Path, config: Config) -> pathlib.Path:
    """A configuration file as run.py takes it."""
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    return path


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


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    """Waits for a process to succeed; gives its standard output."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


def until(process: subprocess.Popen, condition: Callable[[], bool], timeout: float = 60) -> None:
    """Waits until `condition` holds or the process has ended."""
    limit = time.monotonic() + timeout
    while process.poll() is None and not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


# What a run left behind.


def newest_step(workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    directory = pathlib.Path(checkpoint_directory(workdir))
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def saved_state(workdir: pathlib.Path, config: Config) -> dict[str, np.ndarray]:
    """The newest checkpoint of a run by the names of its leaves; leaves the run alone."""
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
    """Leaves by name."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Every leaf, to the last bit."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        assert actual[name].tobytes() == x.tobytes(), name


def assert_close(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    """Every leaf, up to a share of its largest entry."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        worst = np.abs(np.subtract(actual[name], x, dtype=np.float64)).max(initial=0)
        assert worst <= tolerance * np.abs(x).max(initial=0), f"{name}: off by {worst}"


def curve(workdir: pathlib.Path) -> list[dict]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    return [
        {name: x for name, x in line.items() if name not in _CLOCK}
        for line in read_metrics(workdir)
    ]
