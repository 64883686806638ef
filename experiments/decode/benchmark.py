"""Decode steps of the 1B model on one GPU, LUCID beside softmax: time and memory bandwidth.

  python -m experiments.decode.benchmark

Whole steps (embedding to the most likely token) against a cache that is full, by the Triton
kernels and by XLA, with random parameters and a random cache, both bfloat16. Many steps run in
one program, so that the time is the device's. Steps are checked first: against dense attention
at a small size, then the kernels against XLA at every size. Takes about 4 minutes on one H200;
what is done is written after every size. `--small` is a toy size for any machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measuring
from lucid_jax import precondition, softmax_attention
from lucid_jax.config import Config, ModelConfig
from lucid_jax.inference.decoder import Decoder, DecoderParams
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.ops.decode import LayerCache, decode_attention
from lucid_jax.ops.precondition.gram import inverse_norms
from lucid_jax.parallel.mesh import Layout, make_layout

RESULTS = pathlib.Path(__file__).parent / "results"
# (rows, tokens of each), the most telling first.
SIZES = ((1, 32768), (16, 32768), (1, 131072), (16, 131072), (1, 2048), (16, 2048))
SMALL_SIZES = ((1, 64), (2, 128))
KINDS = ("softmax", "lucid")
# A few roundings of bfloat16, as in `kernels`; a wrong step is off by 0.1 and more.
TOLERANCE = 2**-6
GATE_ROWS = 300
# Bytes a second, data sheets of NVIDIA (SXM).
BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
# What the parameters and the cache may take of a device's memory.
_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model, and how many steps a program takes."""

    model: ModelConfig
    layout: Layout
    implementations: tuple[str, ...]
    steps: int

    def decoder(self, kind: str, implementation: str) -> Decoder:
        """That of one attention kind in all layers."""
        model = dataclasses.replace(self.model, attention=kind, implementation=implementation)
        return Decoder(LanguageModel.build(model, self.layout))

    def cache_bytes(self, kind: str, batch: int, length: int) -> int:
        """Of keys, values, and the norms of LUCID attention in float32."""
        m = self.model
        numbers = batch * length * m.num_layers * m.num_kv_heads
        return numbers * (2 * 2 * m.head_dim + (4 if kind == "lucid" else 0))


def draw_cache(model: ModelConfig, batch: int, length: int) -> tuple[LayerCache, ...]:
    """Keys that share a direction, so that `A` is far from the identity; random values."""
    shape = batch, model.num_kv_heads, length, model.head_dim

    @jax.jit
    def draw(layer):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), layer), 3)
        k, y = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
        common = jax.random.normal(keys[2], (1, *shape[1:2], 1, shape[3]), jnp.bfloat16)
        k = k + jnp.bfloat16(0.7) * common
        return LayerCache(k, y, inverse_norms(k))

    return tuple(draw(layer) for layer in range(model.num_layers))


def without_norms(cache: Sequence[LayerCache]) -> tuple[LayerCache, ...]:
    """As softmax attention has it."""
    return tuple(dataclasses.replace(rows, inverse_norms=None) for rows in cache)


# Gates.


def gate_small(setting: Setting, kind: str, implementation: str) -> float:
    """The error of the last of GATE_ROWS rows against dense attention in float32.

    Raises:
      GateError: it exceeds the tolerance.
    """
    m = setting.model
    key = jax.random.key(2)
    q = jax.random.normal(key, (2, GATE_ROWS, m.num_heads, m.head_dim), jnp.bfloat16)
    rows = draw_cache(dataclasses.replace(m, num_layers=1), 2, GATE_ROWS)[0]
    k, v = (x.swapaxes(1, 2) for x in (rows.k, rows.y))

    @jax.jit
    def dense(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        y = precondition(k, v, implementation="reference") if kind == "lucid" else v
        return softmax_attention(q, k, y, implementation="reference")[:, -1], y

    o, y = dense(q, k, v)
    norms = rows.inverse_norms if kind == "lucid" else None
    # The last place is where the step puts its row.
    cached = LayerCache(rows.k, y.swapaxes(1, 2).astype(jnp.bfloat16).at[:, :, -1].set(0), norms)
    length = jnp.full(2, GATE_ROWS - 1, jnp.int32)
    step = functools.partial(decode_attention, implementation=implementation)
    found, after = jax.jit(step)(q[:, -1], k[:, -1], v[:, -1], cached, length)
    return measuring.judge(
        f"a {kind} step of {implementation}",
        {"o": found, "y": after.y[:, :, -1]},
        {"o": np.asarray(o, np.float64), "y": np.asarray(y[:, -1], np.float64)},
        TOLERANCE,
    )


def gate_kernels(setting: Setting, kind: str, rows: LayerCache) -> float:
    """The error of the kernels against XLA on the cache of a layer.

    Raises:
      GateError: it exceeds the tolerance.
    """
    m, (batch, _, length, _) = setting.model, rows.k.shape
    keys = jax.random.split(jax.random.key(3), 3)
    q = jax.random.normal(keys[0], (batch, m.num_heads, m.head_dim), jnp.bfloat16)
    # A key that is like those of the cache.
    k = rows.k[:, :, 0] + rows.k[:, :, 1]
    v = jax.random.normal(keys[1], k.shape, jnp.bfloat16)
    lengths = jnp.maximum(length - 1 - 37 * jnp.arange(batch, dtype=jnp.int32), 1)
    cached = rows if kind == "lucid" else without_norms([rows])[0]

    def results(implementation: str) -> dict[str, np.ndarray]:
        step = functools.partial(decode_attention, implementation=implementation)
        o, after = jax.jit(step)(q, k, v, cached, lengths)
        y = after.y[jnp.arange(batch), :, lengths]
        return {"o": np.asarray(o, np.float64), "y": np.asarray(y, np.float64)}

    name = f"a {kind} step at {batch}×{length}"
    return measuring.judge(name, results("triton"), results("xla"), TOLERANCE)


# Timing.


class Program:
    """So many steps of one contestant in one program, from a full cache back to it."""

    def __init__(self, setting: Setting, kind: str, implementation: str):
        self._decoder, self._steps = setting.decoder(kind, implementation), setting.steps
        self.lucid = kind == "lucid"

    def compile(self, params: DecoderParams, cache: Sequence[LayerCache]) -> jax.stages.Compiled:
        """A function of parameters and cache, which it gives back."""
        batch, _, length, _ = cache[0].k.shape

        def run(params, cache):
            lengths = jnp.full(batch, length - self._steps, jnp.int32)

            def step(i, carry):
                tokens, cache = carry
                x, cache = self._decoder.step(params, cache, tokens, lengths + i)
                logits = self._decoder.logits(params, x)
                return jnp.argmax(logits, -1).astype(jnp.int32), cache

            start = jnp.arange(batch, dtype=jnp.int32), cache
            return jax.lax.fori_loop(0, self._steps, step, start)

        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (params, self.view(cache)),
        )
        return jax.jit(run, donate_argnums=1).lower(*shapes).compile()

    def view(self, cache: Sequence[LayerCache]) -> tuple[LayerCache, ...]:
        """What it takes of a cache with norms."""
        return tuple(cache) if self.lucid else without_norms(cache)


def time_steps(
    setting: Setting, params: DecoderParams, batch: int, length: int, seconds: float
) -> dict:
    """Checks, then times every contestant at one size, all on one cache; a record."""
    cache = draw_cache(setting.model, batch, length)
    errors = {}
    if "triton" in setting.implementations and "xla" in setting.implementations:
        errors = {kind: gate_kernels(setting, kind, cache[0]) for kind in KINDS}
    programs = {
        (kind, implementation): Program(setting, kind, implementation)
        for implementation in setting.implementations
        for kind in KINDS
    }
    start = time.perf_counter()
    first, *others = programs
    # The first tries algorithms of matrix products out; the others take what it found.
    compiled = {first: programs[first].compile(params, cache)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        work = {name: pool.submit(programs[name].compile, params, cache) for name in others}
        compiled |= {name: done.result() for name, done in work.items()}
    compile_seconds = time.perf_counter() - start

    def run(name: tuple[str, str]) -> None:
        nonlocal cache
        tokens, after = compiled[name](params, programs[name].view(cache))
        jax.block_until_ready(tokens)
        cache = tuple(
            dataclasses.replace(rows, inverse_norms=before.inverse_norms)
            if rows.inverse_norms is None
            else rows
            for rows, before in zip(after, cache)
        )

    times = measuring.interleaved(
        {name: functools.partial(run, name) for name in programs}, seconds
    )
    bandwidth = BANDWIDTH.get(jax.devices()[0].device_kind)
    results: dict[str, dict] = {}
    for (kind, implementation), x in times.items():
        step = statistics.median(x) / setting.steps
        read = parameter_bytes(params) + setting.cache_bytes(kind, batch, length)
        results.setdefault(implementation, {})[kind] = {
            "step_ms": 1e3 * step,
            "quartiles_ms": [1e3 * q / setting.steps for q in statistics.quantiles(x, n=4)[::2]],
            "bytes_read": read,
            "gb_per_second": read / step / 1e9,
            "share_of_bandwidth": read / step / bandwidth if bandwidth else None,
            "temporaries": measuring.temp_bytes(compiled[kind, implementation]),
        }
    for by_kind in results.values():
        ratio = by_kind["lucid"]["step_ms"] / by_kind["softmax"]["step_ms"]
        by_kind["overhead_percent"] = 100 * (ratio - 1)
    return {
        "batch": batch,
        "length": length,
        "gate_errors": errors,
        "compile_seconds": compile_seconds,
        "rounds": len(next(iter(times.values()))),
        "steps": results,
    }


def parameter_bytes(params: DecoderParams) -> int:
    """What a step reads: all but the embedding, of which it takes a row a token."""
    outer = {name: x for name, x in params.outer.items() if name != "embedding"}
    return sum(x.nbytes for x in jax.tree.leaves((outer, params.layers)))


def fits(setting: Setting, params: DecoderParams, batch: int, length: int) -> bool:
    """Whether a cache of this size is sure to fit beside the parameters."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    needed = parameter_bytes(params) + setting.cache_bytes("lucid", batch, length)
    return limit is None or needed < _SHARE * limit


def table(records: Sequence[Mapping]) -> str:
    """Markdown."""
    lines = [
        "| rows × cache | attention by | softmax step | LUCID step | overhead"
        " | LUCID reads | of the bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in records:
        for implementation, kinds in x["steps"].items():
            lucid = kinds["lucid"]
            share = lucid["share_of_bandwidth"]
            lines.append(
                f"| {x['batch']} × {x['length']} | {implementation}"
                f" | {kinds['softmax']['step_ms']:.3f} ms | {lucid['step_ms']:.3f} ms"
                f" | {kinds['overhead_percent']:.1f}% | {lucid['gb_per_second']:,.0f} GB/s"
                f" | {'–' if share is None else f'{share:.0%}'} |"
            )
    return "\n".join(lines)


def make_setting(small: bool) -> Setting:
    """The 1B model, or a toy of its kind."""
    values = importlib.import_module("configs.lucid_1b").get_config("smoke" if small else "full")
    values.model.compute_dtype = "bfloat16"
    config = Config.from_dict(values.to_dict())
    on_gpu = jax.default_backend() == "gpu"
    return Setting(
        config.model,
        make_layout(config, jax.devices()[:1]),
        implementations=("triton", "xla") if on_gpu else ("xla",),
        steps=4 if small else 32,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times every size, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a toy size, on any machine")
    parser.add_argument("--seconds", type=float, default=4, help="of timing, a size")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if not flags.small and jax.default_backend() != "gpu":
        parser.error(f"it needs a GPU, or --small; the default backend is {jax.default_backend()}")
    environment = measuring.environment(("flax",))
    setting = make_setting(flags.small)
    gates = {
        f"{kind}, {implementation}": gate_small(setting, kind, implementation)
        for implementation in setting.implementations
        for kind in KINDS
    }
    print("errors against dense attention:", {k: f"{x:.1e}" for k, x in gates.items()}, flush=True)
    prepare = jax.jit(setting.decoder("lucid", "xla").prepare)
    params = prepare(LanguageModel.build(setting.model, setting.layout).init(seed=0))
    print(f"parameters read by a step: {parameter_bytes(params) / 1e9:.2f} GB", flush=True)

    records, skipped = [], []
    flags.out.mkdir(parents=True, exist_ok=True)
    for batch, length in SMALL_SIZES if flags.small else SIZES:
        if not fits(setting, params, batch, length):
            skipped.append(f"{batch}×{length}: the cache does not fit the memory")
            print("skipped", skipped[-1], flush=True)
            continue
        records.append(time_steps(setting, params, batch, length, flags.seconds))
        print("\n".join(table(records[-1:]).splitlines()[2:]), flush=True)
        result = {
            "command": "python -m experiments.decode.benchmark",
            "environment": environment,
            "model": "lucid_1b" + (":smoke" if flags.small else ""),
            "dtype": "bfloat16",
            "steps_in_a_program": setting.steps,
            "gate_errors": gates,
            "skipped": skipped,
            "records": records,
        }
        (flags.out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
