"""Decode steps of the 1B model on one GPU, LUCID beside softmax: time and memory bandwidth.

  python -m experiments.decode.benchmark

Times whole steps (embedding to the most likely token) with a full KV cache, by the Triton kernels
and by XLA; parameters and cache are random and bfloat16. One program runs many steps, so that the
time is the device's. Steps are checked first: against dense attention at a small size, then the
kernels against XLA at every size. Takes about 4 minutes on one H200, and writes benchmark.json
after every size. `--small` is a toy size for any machine.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measuring, reporting
from experiments.kernels import TOLERANCE
from lucid_jax import precondition, softmax_attention
from lucid_jax.config import Config, ModelConfig
from lucid_jax.inference.decoder import Decoder, DecoderParams
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.ops.decode import LayerCache, decode_attention
from lucid_jax.ops.precondition.gram import inverse_norms
from lucid_jax.parallel.mesh import Layout, make_layout

# Sequences and tokens of each, the most telling first.
SIZES = ((1, 32768), (16, 32768), (1, 131072), (16, 131072), (1, 2048), (16, 2048))
SMALL_SIZES = ((1, 64), (2, 128))
KINDS = ("softmax", "lucid")
GATE_TOKENS = 300
# Bytes a second, from NVIDIA's data sheets (SXM).
BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
# Share of a device's memory that parameters and cache may take.
_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, its implementations, and the steps of a program."""

    model: ModelConfig
    layout: Layout
    implementations: tuple[str, ...]
    steps: int

    def decoder(self, kind: str, implementation: str) -> Decoder:
        """Returns the decoder with one kind of attention in all layers."""
        model = dataclasses.replace(self.model, attention=kind, implementation=implementation)
        return Decoder(LanguageModel.build(model, self.layout))

    def cache_bytes(self, kind: str, batch: int, length: int) -> int:
        """Returns the bytes of keys, values, and LUCID's float32 norms."""
        m = self.model
        numbers = batch * length * m.num_layers * m.num_kv_heads
        return numbers * (2 * 2 * m.head_dim + (4 if kind == "lucid" else 0))


def make_setting(small: bool) -> Setting:
    """Returns the 1B model, or a toy of its kind."""
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


def draw_cache(model: ModelConfig, batch: int, length: int) -> tuple[LayerCache, ...]:
    """Returns random values, and keys that share a direction, so that `A` is not the identity."""
    shape = batch, model.num_kv_heads, length, model.head_dim

    @jax.jit
    def draw(layer):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), layer), 3)
        k, y = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
        common = jax.random.normal(keys[2], (1, *shape[1:2], 1, shape[3]), jnp.bfloat16)
        k = k + jnp.bfloat16(0.7) * common
        return LayerCache(k, y, inverse_norms(k))

    return tuple(draw(layer) for layer in range(model.num_layers))


def cache_of_kind(kind: str, cache: Sequence[LayerCache]) -> tuple[LayerCache, ...]:
    """Returns the cache as it is for LUCID, and without norms for softmax attention."""
    if kind == "lucid":
        return tuple(cache)
    return tuple(dataclasses.replace(layer, inverse_norms=None) for layer in cache)


def gate_small(setting: Setting, kind: str, implementation: str) -> float:
    """Returns the error of the last token against dense float32 attention, or raises GateError."""
    m = dataclasses.replace(setting.model, num_layers=1)
    shape = 2, GATE_TOKENS, m.num_heads, m.head_dim
    q = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)
    [layer] = draw_cache(m, 2, GATE_TOKENS)
    k, v = (x.swapaxes(1, 2) for x in (layer.k, layer.y))

    @jax.jit
    def dense(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        y = precondition(k, v, implementation="reference") if kind == "lucid" else v
        return softmax_attention(q, k, y, implementation="reference")[:, -1], y

    o, y = dense(q, k, v)
    # The step writes the last place.
    filled = y.swapaxes(1, 2).astype(jnp.bfloat16).at[:, :, -1].set(0)
    [cached] = cache_of_kind(kind, [dataclasses.replace(layer, y=filled)])
    length = jnp.full(2, GATE_TOKENS - 1, jnp.int32)
    step = functools.partial(decode_attention, implementation=implementation)
    found, after = jax.jit(step)(q[:, -1], k[:, -1], v[:, -1], cached, length)
    exact = {"o": np.asarray(o, np.float64), "y": np.asarray(y[:, -1], np.float64)}
    name = f"a {kind} step of {implementation}"
    return measuring.judge(name, {"o": found, "y": after.y[:, :, -1]}, exact, TOLERANCE)


def gate_kernels(setting: Setting, kind: str, layer: LayerCache) -> float:
    """Returns the kernels' error against XLA on the cache of a layer, or raises GateError."""
    m, (batch, _, length, _) = setting.model, layer.k.shape
    keys = jax.random.split(jax.random.key(3), 2)
    q = jax.random.normal(keys[0], (batch, m.num_heads, m.head_dim), jnp.bfloat16)
    # A key like those of the cache.
    k = layer.k[:, :, 0] + layer.k[:, :, 1]
    v = jax.random.normal(keys[1], k.shape, jnp.bfloat16)
    lengths = jnp.maximum(length - 1 - 37 * jnp.arange(batch, dtype=jnp.int32), 1)
    [cached] = cache_of_kind(kind, [layer])

    def results(implementation: str) -> dict[str, np.ndarray]:
        step = functools.partial(decode_attention, implementation=implementation)
        o, after = jax.jit(step)(q, k, v, cached, lengths)
        y = after.y[jnp.arange(batch), :, lengths]
        return {"o": np.asarray(o, np.float64), "y": np.asarray(y, np.float64)}

    name = f"a {kind} step at {batch}×{length}"
    return measuring.judge(name, results("triton"), results("xla"), TOLERANCE)


def compile_steps(
    setting: Setting, kind: str, implementation: str, params: DecoderParams,
    cache: Sequence[LayerCache],
) -> jax.stages.Compiled:  # fmt: skip
    """Compiles the steps of a program, which fills the end of the cache and returns it."""
    decoder, steps = setting.decoder(kind, implementation), setting.steps
    batch, _, length, _ = cache[0].k.shape

    def run(params, cache):
        lengths = jnp.full(batch, length - steps, jnp.int32)

        def step(i, carry):
            tokens, cache = carry
            x, cache = decoder.step(params, cache, tokens, lengths + i)
            logits = decoder.logits(params, x)
            return jnp.argmax(logits, -1).astype(jnp.int32), cache

        start = jnp.arange(batch, dtype=jnp.int32), cache
        return jax.lax.fori_loop(0, steps, step, start)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (params, cache_of_kind(kind, cache)),
    )
    return jax.jit(run, donate_argnums=1).lower(*shapes).compile()


def time_steps(
    setting: Setting, params: DecoderParams, batch: int, length: int, seconds: float
) -> dict:
    """Checks, then times every contestant at one size, all on one cache; returns a record."""
    cache = draw_cache(setting.model, batch, length)
    errors = {}
    if "triton" in setting.implementations:
        errors = {kind: gate_kernels(setting, kind, cache[0]) for kind in KINDS}
    first, *others = [(kind, i) for i in setting.implementations for kind in KINDS]
    # The first program tries algorithms of matrix products, and the others reuse its choice.
    compiled = {first: compile_steps(setting, *first, params, cache)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        work = {x: pool.submit(compile_steps, setting, *x, params, cache) for x in others}
        compiled |= {name: done.result() for name, done in work.items()}

    def run(name: tuple[str, str]) -> None:
        nonlocal cache
        tokens, after = compiled[name](params, cache_of_kind(name[0], cache))
        jax.block_until_ready(tokens)
        if name[0] == "softmax":
            norms = [layer.inverse_norms for layer in cache]
            after = [dataclasses.replace(x, inverse_norms=n) for x, n in zip(after, norms)]
        cache = tuple(after)

    times = measuring.interleaved({x: functools.partial(run, x) for x in compiled}, seconds)
    bandwidth = BANDWIDTH.get(jax.devices()[0].device_kind)
    steps: dict[str, dict] = {}
    for (kind, implementation), x in times.items():
        step = statistics.median(x) / setting.steps
        read = parameter_bytes(params) + setting.cache_bytes(kind, batch, length)
        steps.setdefault(implementation, {})[kind] = {
            "step_ms": 1e3 * step,
            "bytes_read": read,
            "gb_per_second": read / step / 1e9,
            "share_of_bandwidth": read / step / bandwidth if bandwidth else None,
        }
    return {"batch": batch, "length": length, "gate_errors": errors, "steps": steps}


def parameter_bytes(params: DecoderParams) -> int:
    """Returns the bytes a step reads: all but the embedding, of which it reads a row a token."""
    outer = {name: x for name, x in params.outer.items() if name != "embedding"}
    return sum(x.nbytes for x in jax.tree.leaves((outer, params.layers)))


def fits(setting: Setting, params: DecoderParams, batch: int, length: int) -> bool:
    """Returns whether a cache of this size fits beside the parameters with room to spare."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    needed = parameter_bytes(params) + setting.cache_bytes("lucid", batch, length)
    return limit is None or needed < _SHARE * limit


def table(records: Sequence[Mapping]) -> str:
    """Returns a Markdown table."""
    rows = []
    for x in records:
        for implementation, kinds in x["steps"].items():
            lucid, softmax = kinds["lucid"], kinds["softmax"]
            share = lucid["share_of_bandwidth"]
            rows.append(
                (
                    f"{x['batch']} × {x['length']}", implementation,
                    f"{softmax['step_ms']:.3f} ms", f"{lucid['step_ms']:.3f} ms",
                    f"{lucid['step_ms'] / softmax['step_ms'] - 1:.1%}",
                    f"{lucid['gb_per_second']:,.0f} GB/s", "–" if share is None else f"{share:.0%}",
                )
            )  # fmt: skip
    header = (
        "sequences × cache", "attention by", "softmax step", "LUCID step", "overhead",
        "LUCID reads", "of the bandwidth",
    )  # fmt: skip
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times every size, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--small", action="store_true", help="a toy size, on any machine")
    parser.add_argument("--seconds", type=float, default=4, help="of timing for each size")
    flags = parser.parse_args(argv)
    if not flags.small:
        measuring.require_gpus(parser)
    header = measuring.provenance(flags, ("flax",))
    setting = make_setting(flags.small)
    gates = {
        f"{kind}, {implementation}": gate_small(setting, kind, implementation)
        for implementation in setting.implementations
        for kind in KINDS
    }
    print("errors against dense attention:", {k: f"{x:.1e}" for k, x in gates.items()}, flush=True)
    header |= {
        "model": "lucid_1b" + (":smoke" if flags.small else ""),
        "dtype": "bfloat16",
        "steps_in_a_program": setting.steps,
        "gate_errors": gates,
    }
    prepare = jax.jit(setting.decoder("lucid", "xla").prepare)
    params = prepare(LanguageModel.build(setting.model, setting.layout).init(seed=0))
    print(f"parameters read by a step: {parameter_bytes(params) / 1e9:.2f} GB", flush=True)

    records = []
    for batch, length in SMALL_SIZES if flags.small else SIZES:
        if not fits(setting, params, batch, length):
            print(f"skipped {batch}×{length}: the cache does not fit the memory", flush=True)
            continue
        records.append(time_steps(setting, params, batch, length, flags.seconds))
        print("\n".join(table(records[-1:]).splitlines()[2:]), flush=True)
        reporting.write_json(flags.out / "benchmark.json", **header, records=records)
    print(table(records))


if __name__ == "__main__":
    main()
