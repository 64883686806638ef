"""Converts models like Llama from Hugging Face's format, and back to it.

    python -m lucid_jax.convert from-hf --input=TinyLlama_v1.1 --output=runs/tinyllama
    python -m lucid_jax.convert to-hf --input=runs/tinyllama_lucid --output=tinyllama_lucid

`from-hf` reads a local directory (config.json, safetensors files, a tokenizer) and makes a work
directory: a checkpoint that `--config.checkpoint.init_from=runs/tinyllama` starts from and
`--mode=eval` evaluates, and a configuration, `runs/tinyllama/config.py`. `to-hf` turns any
checkpoint into a directory that transformers loads, with `trust_remote_code=True` if the model has
LUCID layers. Weights keep their bits in float32, or in the dtype that they had in the original.
"""

import argparse
from collections.abc import Sequence

import jax
from absl import flags, logging

from lucid_jax.checkpoint.reader import CheckpointError
from lucid_jax.config import COMPUTE_DTYPES, ConfigError
from lucid_jax.convert.from_hf import from_hf, suggest_command
from lucid_jax.convert.to_hf import to_hf


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; a user error exits with one line and status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    # absl warns about logging before its own flags are parsed.
    flags.FLAGS(["convert"])
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(None)
    logging.set_verbosity(logging.INFO)
    # Nothing is computed here, so leave accelerators to other processes.
    jax.config.update("jax_platforms", "cpu")
    try:
        if arguments.command == "from-hf":
            from_hf(arguments.input, arguments.output, arguments.sequence_length)
            print(suggest_command(arguments.output))
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
    importer = commands.add_parser("from-hf", help="make a work directory from a local model")
    importer.add_argument("--input", required=True, help="directory with config.json")
    importer.add_argument(
        "--output", required=True, help="work directory to create; never overwritten"
    )
    importer.add_argument(
        "--sequence_length",
        type=_positive(int),
        help="tokens of a sequence, on which RoPE depends if rope_type is dynamic (default: the"
        " model's max_position_embeddings)",
    )
    exporter = commands.add_parser("to-hf", help="make a directory that transformers loads")
    exporter.add_argument(
        "--input", required=True, help="work directory, or the directory of one checkpoint"
    )
    exporter.add_argument("--output", required=True, help="directory to create; never overwritten")
    exporter.add_argument(
        "--dtype",
        choices=COMPUTE_DTYPES,
        help="dtype of the weights (default: the narrowest that keeps all bits)",
    )
    exporter.add_argument(
        "--max_shard_gb",
        type=_positive(float),
        default=1.0,
        help="gigabytes of a file at most (default: 1)",
    )
    exporter.add_argument(
        "--tokenizer", help="tokenizer file or 'bytes' (default: the checkpoint's data.tokenizer)"
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
