"""Takes in Llama models of Hugging Face's format, and gives them back.

    python -m lucid_jax.convert from-hf --input=TinyLlama_v1.1 --output=runs/tinyllama
    python -m lucid_jax.convert to-hf --input=runs/tinyllama_lucid --output=tinyllama_lucid

The first makes a work directory of a local directory (config.json, safetensors files, a
tokenizer): a checkpoint that `--config.checkpoint.init_from=runs/tinyllama` starts from and
`--mode=eval` evaluates, and a configuration, `runs/tinyllama/config.py`. The second makes a
directory that transformers loads out of any checkpoint. In the type that they come in, or
in float32, weights keep their bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
from absl import flags, logging

from lucid_jax.checkpoint.manager import CheckpointError
from lucid_jax.config import COMPUTE_DTYPES, ConfigError
from lucid_jax.convert.from_hf import from_hf
from lucid_jax.convert.to_hf import to_hf


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends the process with one line and status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    # absl complains of what is logged before its own flags are parsed.
    flags.FLAGS(["convert"])
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(None)
    logging.set_verbosity(logging.INFO)
    # Nothing is computed here: an accelerator stays free for whoever uses it.
    jax.config.update("jax_platforms", "cpu")
    try:
        if arguments.command == "from-hf":
            from_hf(arguments.input, arguments.output, arguments.sequence_length)
            print(f"python run.py --config={arguments.output}/config.py")
        else:
            to_hf(
                arguments.input,
                arguments.output,
                dtype=arguments.dtype,
                max_shard_bytes=int(arguments.max_shard_gb * 1e9),
                tokenizer=arguments.tokenizer,
            )
            print(arguments.output)
    except (ConfigError, CheckpointError) as error:
        parser.exit(2, f"error: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lucid_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("from-hf", help="makes a work directory of a local model")
    taking.add_argument("--input", required=True, help="a directory with config.json")
    taking.add_argument(
        "--output", required=True, help="a work directory to create; never overwritten"
    )
    taking.add_argument(
        "--sequence_length",
        type=_positive(int),
        help="tokens of a row, where the model stretches its positions by length (rope_type"
        " dynamic); by default all that the model was made for",
    )
    giving = commands.add_parser("to-hf", help="makes a directory that transformers loads")
    giving.add_argument(
        "--input", required=True, help="a work directory, or the directory of one checkpoint"
    )
    giving.add_argument("--output", required=True, help="a folder to create; never overwritten")
    giving.add_argument(
        "--dtype",
        choices=COMPUTE_DTYPES,
        help="of the weights; by default that which the model computes in",
    )
    giving.add_argument(
        "--max_shard_gb", type=_positive(float), default=1.0, help="of a file (default: 1)"
    )
    giving.add_argument(
        "--tokenizer", help="a file or 'bytes'; by default data.tokenizer of the checkpoint"
    )
    return parser


def _positive(kind: type):
    def positive(text: str):
        if not kind(text) > 0:
            raise ValueError
        return kind(text)

    return positive


if __name__ == "__main__":
    main()
