"""Trains LUCID language models, evaluates them, generates text with them, and runs sweeps.

Try it without data or an accelerator, in about two minutes on 2 CPU cores:

  python run.py --config=configs/tiny.py

Train. The same command resumes after any interruption:

  python run.py --config=configs/lucid_1b.py --workdir=runs/a \\
      --config.data.train='web.jsonl@0.8, books/@0.2' --config.data.eval=heldout.jsonl \\
      --config.data.tokenizer=llama.model

Any field of the configuration can be overridden like this; lucid_jax/config.py explains them.
Some configuration files take an argument after a colon: --config=configs/lucid_1b.py:smoke
runs the 1B setting at a toy size.

Measure the loss and perplexity of a checkpoint, also by position in the document:

  python run.py --config=configs/tiny.py --mode=eval

Score it on benchmark tasks at given lengths in tokens; a second run resumes the first:

  python run.py --config=configs/lucid_1b.py --mode=eval \\
      --tasks=ruler_niah_multikey_1,babilong_qa1 --lengths=2048,4096

Continue a prompt from the command line, from a file (--prompt_file) or from standard input:

  python run.py --config=configs/tiny.py --mode=generate --prompt='def solve(' --temperature=0.8

Run all trials of a sweep in turn (or one, for an array job: --trial=2) and print a table:

  python run.py --config=configs/tiny.py --mode=sweep --sweep=configs/sweeps/tiny_attention.py

Compile a training step and report its memory, FLOPs and collectives, for a TPU slice that you
need not have or, without --topology, for the devices of this machine:

  python run.py --config=configs/lucid_1b.py --mode=compile --topology=v5p:2x2x1

A job that a signal stopped exits with code 75, a mistake with 2. Compiled programs are kept in
~/.cache/lucid_jax; the environment variable JAX_COMPILATION_CACHE_DIR names another place.
"""

import functools
import os
import sys
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

FLAGS = flags.FLAGS

# Unknown keys pass here, because Config.from_dict names the nearest known one.
config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with a colon and an argument if it takes one.",
    lock_config=False, accept_new_attributes=True,
)  # fmt: skip
flags.DEFINE_enum("mode", "train", ["train", "eval", "generate", "sweep", "compile"], "The job.")
flags.DEFINE_string(
    "workdir", None,
    "Directory of the run; by default runs/ and the names of the configuration, its argument and"
    " the sweep, as in runs/lucid_1b-smoke and runs/tiny-tiny_attention. A file config.py has the"
    " name of its folder.",
)  # fmt: skip
flags.DEFINE_string(
    "distributed", None,
    "Makes this process one of several: auto (on TPU pods, Slurm, Open MPI, Kubernetes) or"
    " HOST:PORT,INDEX,COUNT with the address of process 0.",
)  # fmt: skip
flags.DEFINE_string("profile", None, "Train: steps to profile, FIRST:LAST, as in 10:15.")
flags.DEFINE_bool(
    "overwrite", False, "Train: remove the run in the work directory first; leave it out to resume."
)
flags.DEFINE_string(
    "checkpoint", "latest", "Eval and generate: latest, best, a step, or a directory."
)
flags.DEFINE_list("tasks", ["loss"], "Eval: loss, or tasks, as in ruler,babilong_qa1.")
flags.DEFINE_list("lengths", [], "Eval: tokens of a task's prompt and answer, as in 2048,4096.")
flags.DEFINE_integer("samples", 500, "Eval: samples of a task at a length.", lower_bound=1)
flags.DEFINE_list(
    "sources", [],
    "Eval: texts of benchmarks, as in essays=essays/,squad=dev-v2.0.json; the names are essays,"
    " books, squad, hotpotqa, longbench and scrolls.",
)  # fmt: skip
flags.DEFINE_string("prompt", None, "Generate: the text to continue.")
flags.DEFINE_string("prompt_file", None, "Generate: a file with the text to continue.")
flags.DEFINE_integer("max_new_tokens", 128, "Generate: the most tokens to add.")
flags.DEFINE_float("temperature", 0.0, "Generate: 0 takes the most likely token.")
flags.DEFINE_integer("top_k", 0, "Generate: sample from the k most likely tokens; 0 means all.")
flags.DEFINE_float("top_p", 1.0, "Generate: sample from the fewest tokens of this probability.")
flags.DEFINE_integer("seed", None, "Generate: seed of the sampling; by default the run's.")
flags.DEFINE_integer("num_samples", 1, "Generate: the number of completions.", lower_bound=1)
flags.DEFINE_bool("echo", None, "Generate: show the prompt; by default on a terminal, in colour.")
flags.DEFINE_string("sweep", None, "Sweep: the file that lists the trials.")
flags.DEFINE_integer("trial", None, "Sweep: the only trial to run.")
flags.DEFINE_string(
    "topology", None,
    "Compile: a TPU slice, as in v4:2x2x1, v5e:4x4, v5p:2x2x4 or v6e:4x4; needs libtpu (pip"
    " install 'jax[tpu]') but no TPU.",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Does the job of --mode; a user error is one line and exit code 2."""
    # Imported here, so that --help answers at once.
    from lucid_jax.checkpoint.reader import CheckpointError
    from lucid_jax.config import Config, ConfigError
    from lucid_jax.ops.check import ImplementationError
    from lucid_jax.runtime.command_line import check_flags, default_workdir, set_up_process
    from lucid_jax.runtime.peers import leave_if_a_peer_is_gone
    from lucid_jax.runtime.preemption import Stopped
    from lucid_jax.runtime.workdir import describe_disk_error

    set_up_process()
    config_file = config_flags.get_config_filename(FLAGS["config"])
    workdir = FLAGS.workdir or default_workdir(config_file, FLAGS.sweep)
    try:
        check_flags(FLAGS, argv[1:])
        if FLAGS.distributed:
            from lucid_jax.runtime.distributed import join

            join(FLAGS.distributed)
        values = FLAGS.config.to_dict()
        if FLAGS.mode == "sweep":
            from lucid_jax.training.sweep import run_sweep

            print(run_sweep(values, FLAGS.sweep, workdir, FLAGS.trial))
        else:
            jobs = {"train": _train, "eval": _evaluate, "generate": _generate, "compile": _compile}
            with leave_if_a_peer_is_gone():
                jobs[FLAGS.mode](Config.from_dict(values), workdir)
    except (ConfigError, CheckpointError, ImplementationError) as error:
        _exit(error)
    except (Stopped, KeyboardInterrupt) as stopped:
        print(stopped)
        sys.exit(os.EX_TEMPFAIL)
    except Exception as error:
        if problem := describe_disk_error(error):
            _exit(f"{workdir}: {problem}")
        raise


def _train(config, workdir: str) -> None:
    from lucid_jax.runtime.command_line import resume_command
    from lucid_jax.runtime.preemption import Stopped
    from lucid_jax.training.loop import train
    from lucid_jax.training.profiler import parse_steps
    from lucid_jax.training.reporter import NonFiniteError

    steps = parse_steps(FLAGS.profile)
    try:
        result = train(config, workdir, profile=steps, overwrite=FLAGS.overwrite)
    except NonFiniteError as error:
        sys.exit(f"error: {error}")
    summary = result.summary(workdir, resume_command(sys.argv))
    if not result.finished:
        raise Stopped(summary)
    print(summary)


def _evaluate(config, workdir: str) -> None:
    from lucid_jax.evaluate.checkpoint import evaluate_checkpoint
    from lucid_jax.evaluate.request import TaskRequest
    from lucid_jax.evaluate.run_tasks import evaluate_tasks

    if FLAGS.tasks == ["loss"]:
        print(evaluate_checkpoint(config, workdir, FLAGS.checkpoint))
    else:
        request = TaskRequest.parse(FLAGS.tasks, FLAGS.lengths, FLAGS.samples, FLAGS.sources)
        print(evaluate_tasks(config, workdir, FLAGS.checkpoint, request))


def _generate(config, workdir: str) -> None:
    from lucid_jax.inference.complete import complete
    from lucid_jax.inference.prompt import echo_of, read_prompt
    from lucid_jax.inference.sampling import Sampling

    seed = config.seed if FLAGS.seed is None else FLAGS.seed
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, seed)
    prompt = read_prompt(FLAGS.prompt, FLAGS.prompt_file, distributed=bool(FLAGS.distributed))
    complete(
        config, workdir, FLAGS.checkpoint, prompt, FLAGS.max_new_tokens, sampling,
        write=functools.partial(print, end="", flush=True),
        num_samples=FLAGS.num_samples, echo=echo_of(prompt, FLAGS.echo, sys.stdout),
    )  # fmt: skip
    print()


def _compile(config, workdir: str) -> None:
    from lucid_jax.training.compile import compile_train_step

    report = compile_train_step(config, FLAGS.topology)
    print(report.table())
    sys.exit(0 if report.fits else 1)


class _Parser(flags.ArgumentParser):
    """A function of command_line.py, which is imported when an argument is parsed."""

    def __init__(self, function: str):
        self._function = function

    def parse(self, argument: str):
        """See that function."""
        from lucid_jax.runtime import command_line

        return getattr(command_line, self._function)(argument)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a user error is one line and exit code 2."""
    FLAGS["config"].parser = _Parser("load_config")
    config_flags.register_flag_parser_for_type(int, _Parser("parse_integer"))
    try:
        return FLAGS(argv)
    except flags.Error as error:
        _exit(error)
    except KeyError as error:
        # config_flags may add the nearest name on a second line.
        message = str(error.args[0]).replace("\n", ". ")
        _exit(f"a --config override names an unknown section: {message}")


def _exit(error: object) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    try:
        app.run(main, flags_parser=_parse_flags)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
