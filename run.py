"""Trains, resumes, evaluates, generates with, sweeps and compiles LUCID language models.

Start here (no data and no accelerator needed, two to three minutes on 2 CPU cores):

  python run.py --config=configs/tiny.py

Train, and go on after any interruption with the same command:

  python run.py --config=configs/lucid_1b.py --workdir=runs/a \\
      --config.data.train='web.jsonl@0.8, books/@0.2' --config.data.eval=heldout.jsonl \\
      --config.data.tokenizer=llama.model

Any field of the configuration can be overridden as above; lucid_jax/config.py
explains each. Some files take an argument after a colon:
--config=configs/lucid_1b.py:smoke runs the 1B setting at a toy size.

Loss and perplexity of a checkpoint, also by position in a row's piece of a document:

  python run.py --config=configs/tiny.py --mode=eval

Its scores on benchmark tasks at some lengths in tokens; a second run does what is left to do:

  python run.py --config=configs/lucid_1b.py --mode=eval \\
      --tasks=ruler_niah_multikey_1,babilong_qa1 --lengths=2048,4096

Text that goes on from a prompt, given here, in a file (--prompt_file) or on standard input:

  python run.py --config=configs/tiny.py --mode=generate --prompt='def solve(' --temperature=0.8

All trials of a sweep in turn (or one: --trial=2, for an array job), then a table:

  python run.py --config=configs/tiny.py --mode=sweep --sweep=configs/sweeps/tiny_attention.py

What a training step takes (memory, FLOPs, collectives) and whether it fits, on a TPU slice
that need not be there, or without --topology on the devices of this machine:

  python run.py --config=configs/lucid_1b.py --mode=compile --topology=v5p:2x2x1
"""

import functools
import logging as py_logging
import pathlib
import re
import shlex
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, with an argument after a colon where it takes one.",
    # A key that is not there gets as far as Config.from_dict, which names the nearest one.
    lock_config=False,
    accept_new_attributes=True,
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "generate", "sweep", "compile"], "What to do."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run lives; by default runs/ and the name of the configuration, its argument"
    " and the name of the sweep: runs/lucid_1b-smoke, runs/tiny-tiny_attention.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "latest",
    "For --mode=eval and --mode=generate: latest, best, or the directory of one step.",
)
_PROMPT = flags.DEFINE_string("prompt", None, "For --mode=generate: what to go on from.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file",
    None,
    "For --mode=generate: a text file to go on from. Without it and --prompt, standard input.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "For --mode=generate: the most tokens to add."
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "For --mode=generate: of the samples; 0 takes the most likely token."
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "For --mode=generate: sample among so many most likely tokens; 0 means all."
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "For --mode=generate: sample among the fewest with this probability together."
)
_TASKS = flags.DEFINE_list(
    "tasks",
    ["loss"],
    "For --mode=eval: loss, or names of benchmark tasks, as in ruler_vt,babilong_qa1.",
)
_LENGTHS = flags.DEFINE_list(
    "lengths", [], "For --tasks: tokens of prompt and answer together, as in 2048,4096."
)
_SAMPLES = flags.DEFINE_integer(
    "samples", 500, "For --tasks: samples of each task at each length.", lower_bound=1
)
_SOURCES = flags.DEFINE_list(
    "sources",
    [],
    "For --tasks: the texts of benchmarks, as in essays=essays/,squad=dev-v2.0.json; the names"
    " are essays, books, squad, hotpotqa, longbench and scrolls.",
)
_SWEEP = flags.DEFINE_string("sweep", None, "For --mode=sweep: the file that lists the trials.")
_TRIAL = flags.DEFINE_integer("trial", None, "For --mode=sweep: run only this trial.")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "For --mode=compile: a TPU slice, as in v4:2x2x1, v5e:4x4, v5p:2x2x4 or v6e:4x4; needs libtpu"
    " (pip install 'jax[tpu]') and no TPU.",
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "To run as one of several processes: auto (on TPU pods, Slurm, Open MPI, Kubernetes) or"
    " HOST:PORT,INDEX,COUNT with the address of process 0.",
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "FIRST:LAST, the steps to record with the JAX profiler, as in 10:15."
)


# Flags that only some modes read.
_MODES_OF_FLAG = {
    "checkpoint": ("eval", "generate"),
    **dict.fromkeys(("tasks", "lengths", "samples", "sources"), ("eval",)),
    **dict.fromkeys(
        ("prompt", "prompt_file", "max_new_tokens", "temperature", "top_k", "top_p"), ("generate",)
    ),
    "sweep": ("sweep",),
    "trial": ("sweep",),
    "topology": ("compile",),
    "profile": ("train",),
}


def main(argv: list[str]) -> None:
    """Dispatches on the mode; what is wrong with the request is one line and exit code 2."""
    # Imported here, so that --help and a mistyped flag answer at once.
    from lucid_jax.checkpoint.manager import CheckpointError
    from lucid_jax.config import Config, ConfigError

    logging.get_absl_handler().setFormatter(None)
    # At INFO jax tells of every platform that this machine does not have.
    py_logging.getLogger("jax").setLevel(py_logging.WARNING)
    workdir = _WORKDIR.value or _default_workdir(
        config_flags.get_config_filename(flags.FLAGS["config"]), _SWEEP.value
    )
    try:
        if len(argv) > 1:
            raise ConfigError(f"unexpected argument {argv[1]!r}; flags start with --")
        for name, modes in _MODES_OF_FLAG.items():
            if flags.FLAGS[name].present and _MODE.value not in modes:
                of = " or ".join(f"--mode={mode}" for mode in modes)
                raise ConfigError(f"--{name} is for {of}; got --mode={_MODE.value}")
        if _DISTRIBUTED.value:
            from lucid_jax.runtime.distributed import join

            join(_DISTRIBUTED.value)
        values = _CONFIG.value.to_dict()
        if _MODE.value == "train":
            _train(Config.from_dict(values), workdir)
        elif _MODE.value == "eval":
            _evaluate(Config.from_dict(values), workdir)
        elif _MODE.value == "generate":
            _generate(Config.from_dict(values), workdir)
        elif _MODE.value == "compile":
            from lucid_jax.training.compile import compile_train_step

            report = compile_train_step(Config.from_dict(values), _TOPOLOGY.value)
            _say(report.table())
            sys.exit(0 if report.fits else 1)
        else:
            from lucid_jax.training.sweep import run_sweep

            _say(run_sweep(values, _SWEEP.value, workdir, _TRIAL.value))
    except (ConfigError, CheckpointError) as error:
        _exit(2, str(error))


def _train(config, workdir: str) -> None:
    from lucid_jax.training.loop import parse_steps, train
    from lucid_jax.training.reporter import NonFiniteError

    try:
        result = train(config, workdir, profile=parse_steps(_PROFILE.value))
    except NonFiniteError as error:
        _exit(1, str(error))
    # With all its overrides, as other data would be refused; what is profiled is done.
    again = re.sub(r" --?profile[= ]\S+", "", shlex.join(["python", *sys.argv]))
    state = "finished" if result.finished else "stopped"
    _say(f"{state} at step {result.step} of {result.steps}; files are in {workdir}/")
    if result.report:
        _say(
            f"evaluation loss {result.report.loss:.4f}"
            f" (best unigram model {result.report.unigram_loss:.4f})"
        )
    _say(f"evaluate: {again} --mode=eval")
    extend = f" --config.steps={2 * result.steps}" if result.finished else ""
    _say(f"resume{' and extend' if extend else ''}: {again}{extend}")


def _generate(config, workdir: str) -> None:
    from lucid_jax.inference.complete import complete
    from lucid_jax.inference.sampling import Sampling

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, config.seed)
    say = functools.partial(_say, end="", flush=True)
    complete(
        config, workdir, _CHECKPOINT.value, _read_prompt(), _MAX_NEW_TOKENS.value, sampling, say
    )
    _say("")


def _read_prompt() -> str:
    """The text of the one place where it is."""
    from lucid_jax.config import ConfigError

    if _PROMPT.value is not None and _PROMPT_FILE.value is not None:
        raise ConfigError("--prompt and --prompt_file are both given")
    if _PROMPT.value is not None:
        return _PROMPT.value
    if _PROMPT_FILE.value is None and _DISTRIBUTED.value:
        raise ConfigError("--distributed needs --prompt or --prompt_file, the same everywhere")
    try:
        if _PROMPT_FILE.value is None:
            return sys.stdin.read()
        return pathlib.Path(_PROMPT_FILE.value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        where = (
            "standard input"
            if _PROMPT_FILE.value is None
            else f"--prompt_file={_PROMPT_FILE.value}"
        )
        raise ConfigError(f"{where} cannot be read: {error}") from error


def _evaluate(config, workdir: str) -> None:
    from lucid_jax.config import ConfigError

    names = _TASKS.value
    if names != ["loss"]:
        from lucid_jax.evaluate.request import TaskRequest
        from lucid_jax.evaluate.run_tasks import evaluate_tasks

        request = TaskRequest.parse(names, _LENGTHS.value, _SAMPLES.value, _SOURCES.value)
        _say(evaluate_tasks(config, workdir, _CHECKPOINT.value, request))
        return
    from lucid_jax.evaluate.checkpoint import evaluate_checkpoint

    for name in ("lengths", "samples", "sources"):
        if flags.FLAGS[name].present:
            raise ConfigError(f"--{name} is for tasks other than loss; got --tasks=loss")
    _say(evaluate_checkpoint(config, workdir, _CHECKPOINT.value))


def _default_workdir(config: str, sweep: str | None) -> str:
    path, *size = config.split(":", 1)
    names = [pathlib.Path(path).stem, *size, *([pathlib.Path(sweep).stem] if sweep else [])]
    return f"runs/{'-'.join(names)}"


def _parse_flags(argv: list[str]) -> list[str]:
    """As absl does; a --config or an override that leads nowhere is one line as well."""
    _check_config_file(argv)
    try:
        return app.parse_flags_with_usage(argv)
    except KeyError:
        _check_sections(argv)
        raise


def _check_config_file(argv: list[str]) -> None:
    """Exits if a --config cannot be loaded, where the flag would give a stack trace."""
    for argument, after in zip(argv, [*argv[1:], ""]):
        if not (match := re.fullmatch(r"--?config(=.*)?", argument)):
            continue
        from lucid_jax.config import ConfigError
        from lucid_jax.runtime.user_file import call_in_file

        path, *size = (match[1][1:] if match[1] else after).split(":", 1)
        try:
            config = call_in_file(path, "get_config", *size)
            if not isinstance(config, ConfigDict):
                raise ConfigError(
                    f"{path}: get_config() must return a ConfigDict; got {type(config).__name__}"
                )
        except ConfigError as error:
            _exit(2, f"--config: {error}")


def _check_sections(argv: list[str]) -> None:
    """Exits if an override is of a section that no configuration has."""
    from lucid_jax.config import Config, ConfigError

    for argument in argv:
        if match := re.match(r"--?config\.([\w.]+)\.\w+", argument):
            section: dict = {}
            for name in reversed(match[1].split(".")):
                section = {name: section}
            try:
                Config.from_dict(section)
            except ConfigError as error:
                _exit(2, str(error))


def _say(text: str, **options) -> None:
    """Prints on one process of a run."""
    import jax

    if jax.process_index() == 0:
        print(text, **options)


def _exit(code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse_flags)
