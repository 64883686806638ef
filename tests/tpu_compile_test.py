"""The TPU compiler accepts every kernel and whole training steps; no TPU is needed."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from configs import lucid_1b, lucid_1b_1m, lucid_1b_128k
from lucid_jax import Prefix, lucid_attention, precondition
from lucid_jax.config import MESH_AXES, Config, ConfigError
from lucid_jax.parallel import context_attention
from lucid_jax.parallel.mesh import arrange
from lucid_jax.training.compile import compile_train_step, topology_devices
from pallas_kernels.mosaic_tpu import tile
from pallas_kernels.mosaic_tpu.cross_gradient import cross_key_gradient
from pallas_kernels.mosaic_tpu.diagonal import diagonal_inverses
from pallas_kernels.mosaic_tpu.product import product
from pallas_kernels.mosaic_tpu.solve import solve
from pallas_kernels.mosaic_tpu.solve_transposed import solve_transposed
from pallas_kernels.mosaic_tpu.tiles import VMEM_BYTES, Tiles

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)

SLICES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def compile_for(topology: str, f, *shapes):
    """Compiles `f` for every device of a slice; the shapes are those of one device."""
    mesh, replicated = jax.sharding.Mesh(topology_devices(topology), "x"), PartitionSpec()
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, replicated)),
        shapes,
    )
    run = jax.shard_map(f, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False)
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def shape(*sizes, dtype="int32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def forward_and_backward(op):
    def run(arrays, **options):
        out, pull_back = jax.vjp(lambda arrays: op(*arrays, **options), arrays)
        return out, pull_back(out)

    return run


def cases():
    """Yields every chip, length, head dimension and dtype; all but two cases are slow."""
    quick = {
        ("v4:2x2x1", 131_072, 128, "float32"),
        ("v6e:2x2", 2048, 64, "bfloat16"),
    }
    for topology in SLICES:
        for s in (2048, 131_072):
            for d in (64, 128):
                for dtype in ("bfloat16", "float32"):
                    case = topology, s, d, dtype
                    marks = () if case in quick else pytest.mark.slow
                    yield pytest.param(*case, marks=marks)


@pytest.mark.parametrize(("topology", "s", "d", "dtype"), [*cases()])
def test_kernels_compile_forward_and_backward(topology, s, d, dtype):
    x = shape(1, s, 4, d, dtype=dtype)
    run = forward_and_backward(precondition)
    compiled = compile_for(topology, lambda x, ids: run((x, x), segment_ids=ids), x, shape(1, s))
    text = compiled.as_text()
    for name in ("lucid_diagonal_inverses", "lucid_solve", "lucid_solve_transposed"):
        assert f"%{name}" in text, name
    # 16 float32 arrays of this shape, padded to 128 lanes; A is as large as S/128 of them.
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 4 * s * 4 * 128


@pytest.mark.parametrize(
    ("topology", "dtype", "packed"),
    [
        ("v5p:2x2x1", "bfloat16", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("v4:2x2x1", "float32", False), ("v6e:2x2", "float32", True))
        ),
    ],
)
def test_kernels_with_beta_compile(topology, dtype, packed):
    x, beta = shape(2, 2000, 4, 64, dtype=dtype), shape(2, 2000, 4, dtype="float32")
    op = forward_and_backward(lambda k, beta, ids: precondition(k, k, beta=beta, segment_ids=ids))
    run = lambda k, beta, ids: op((k, beta), ids=ids if packed else None)  # noqa: E731
    text = compile_for(topology, run, x, beta, shape(2, 2000)).as_text()
    for name in ("lucid_diagonal_inverses", "lucid_solve", "lucid_solve_transposed"):
        assert f"%{name}" in text, name


@pytest.mark.parametrize(
    "topology", [SLICES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in SLICES[1:])]
)
def test_a_prefix_compiles(topology):
    x, p = shape(2, 300, 2, 68, dtype="bfloat16"), shape(2, 1000, 2, 68, dtype="bfloat16")

    def op(k, v, prefix_k, prefix_y, ids, prefix_ids, length):
        prefix = Prefix(prefix_k, prefix_y, prefix_ids, length)
        return precondition(k, v, segment_ids=ids, prefix=prefix)

    def run(x, p, *ids):
        return forward_and_backward(lambda *arrays: op(*arrays, *ids))((x, x, p, p))

    compiled = compile_for(topology, run, x, p, shape(2, 300), shape(2, 1000), shape(2))
    for name in ("lucid_product", "lucid_cross_key_gradient"):
        assert f"%{name}" in compiled.as_text(), name


@pytest.mark.parametrize(
    ("topology", "s", "packed"),
    [
        ("v6e:2x2", 2048, True),
        pytest.param("v5e:2x2", 2048, False, marks=pytest.mark.slow),
        pytest.param("v5p:2x2x1", 131_072, True, marks=pytest.mark.slow),
        pytest.param("v4:2x2x1", 131_072, False, marks=pytest.mark.slow),
    ],
)
def test_lucid_attention_uses_the_kernels_and_splash_attention(topology, s, packed):
    q, k = (shape(1, s, heads, 64, dtype="bfloat16") for heads in (32, 4))
    run = forward_and_backward(lucid_attention)
    compiled = compile_for(
        topology,
        lambda q, k, ids: run((q, k, k), segment_ids=ids if packed else None),
        q, k, shape(1, s),
    )  # fmt: skip
    assert "%lucid_solve" in compiled.as_text()
    assert "splash" in compiled.as_text()
    # The log-sum-exp of splash attention has 128 lanes; a T×T array would take S/128 times as much.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 32 * s * 128 * 4


@pytest.mark.parametrize(
    "d", [68, *(pytest.param(d, marks=pytest.mark.slow) for d in (8, 96, 256))]
)
def test_any_head_dimension_compiles(d):
    q, k = (shape(1, 600, heads, d, dtype="bfloat16") for heads in (4, 2))
    run = forward_and_backward(lucid_attention)
    compiled = compile_for("v4:2x2x1", lambda q, k: run((q, k, k)), q, k)
    assert "%lucid_solve" in compiled.as_text()
    assert "splash" in compiled.as_text()


def kernel_call(kernel, tiles, d, dtype):
    """Returns one kernel and the shapes of its arguments for two systems of 4096 rows."""
    m, s, w = 2, 4096, tile.width(d)
    x, wide = shape(m, s, w, dtype=dtype), shape(m, s, w, dtype="float32")
    inverses = shape(m, s, tile.BLOCK, dtype="float32")
    rows, columns = (shape(1, s // n, 1, n) for n in (tiles.rows, tiles.columns))
    roots = shape(m, s // tiles.rows, 1, tiles.rows, dtype="float32")
    bound, limit = shape(1, s // tiles.rows), shape(s // tiles.rows)
    bounds = bound, bound, (limit, limit)
    op, *shapes = {
        "lucid_diagonal_inverses": (diagonal_inverses, x, rows, roots),
        "lucid_solve": (solve, x, inverses, wide, rows, columns, bound),
        "lucid_solve_transposed": (solve_transposed, x, inverses, x, x, rows, columns, bound),
        "lucid_product": (product, x, x, x, rows, columns, *bounds),
        "lucid_cross_key_gradient": (cross_key_gradient, x, x, x, x, rows, columns, *bounds),
    }[kernel]
    options = {"transposed": True} if op is diagonal_inverses else {}
    return functools.partial(op, d=d, tiles=tiles, **options), shapes


SLOW_TILES = (
    (128, "bfloat16", Tiles(1024, 512)),
    (256, "bfloat16", Tiles(512, 512)),
    (64, "float32", Tiles(512, 256)),
    (128, "float32", Tiles(512, 256)),
    (256, "float32", Tiles(256, 256)),
)


def vmem_cases():
    for kernel in VMEM_BYTES:
        yield kernel, 64, "bfloat16", Tiles(1024, 512)
        for case in SLOW_TILES:
            yield pytest.param(kernel, *case, marks=pytest.mark.slow)
    # The tiles of rectangles with few rows a block.
    for kernel in ("lucid_product", "lucid_cross_key_gradient"):
        for case in ((64, "bfloat16", Tiles(256, 2048)), (128, "float32", Tiles(128, 2048))):
            yield pytest.param(kernel, *case, marks=pytest.mark.slow)


@pytest.mark.parametrize(("kernel", "d", "dtype", "tiles"), [*vmem_cases()])
def test_the_vmem_count_is_sufficient_and_not_far_above_the_need(
    kernel, d, dtype, tiles, monkeypatch
):
    counted = VMEM_BYTES[kernel](tiles, jnp.dtype(dtype), d)
    op, shapes = kernel_call(kernel, tiles, d, dtype)
    real = pltpu.CompilerParams

    def compile_within(limit):
        monkeypatch.setattr(
            pltpu, "CompilerParams", lambda **options: real(**options | {"vmem_limit_bytes": limit})
        )
        compile_for("v5p:2x2x1", op, *shapes)

    compile_within(counted)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_within(int(0.4 * counted))


def test_tiles_that_exceed_vmem_are_refused():
    op, shapes = kernel_call("lucid_solve", Tiles(2048, 1024), 128, "float32")
    message = (
        r"lucid_solve with tiles of 2048×1024 at D = 128 in float32 needs [\d.]+ MiB of VMEM;"
        r" this chip has 16.0 MiB"
    )
    with pytest.raises(ValueError, match=message):
        compile_for("v4:2x2x1", op, *shapes)


def toy_config(**changes):
    values = lucid_1b.get_config("smoke").to_dict()
    return Config.from_dict(values | changes)


@pytest.mark.parametrize(
    ("topology", "devices", "capacity"),
    [("v5e:2x2", "4 × TPU v5 lite", 17_200_000_000), ("v4:2x2x1", "4 × TPU v4", 34_400_000_000)],
)
def test_a_training_step_that_fits(topology, devices, capacity):
    report = compile_train_step(toy_config(), topology)
    assert report.fits
    assert report.devices == devices
    assert report.traffic["all-gather"].bytes > 0
    assert report.capacity == capacity
    assert "it fits" in report.table()


def test_a_training_step_that_does_not_fit_names_its_largest_buffers():
    model = toy_config().to_dict()["model"] | {"mlp_dim": 65_536, "embed_dim": 8192}
    report = compile_train_step(toy_config(model=model, batch_size=64), "v5e:2x2")
    assert not report.fits
    assert sum(report.memory.values()) > report.capacity
    assert "8192" in report.largest[0]
    assert "GiB" in report.largest[0]
    assert "it does NOT fit" in report.table()


def context_parallel_text(topology: str, op, s: int, heads: int, kv_heads: int, **options) -> str:
    """Compiles a context-parallel op on a slice, forward and backward, and returns the text."""
    devices = topology_devices(topology)
    mesh, rows = jax.sharding.Mesh(devices, "x"), PartitionSpec(None, "x")

    def op_on_shard(q, k, v, ids):
        return op(q, k, v, axis_name="x", stripe=256, segment_ids=ids)

    sharded = jax.shard_map(op_on_shard, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    q, k = (shape(1, s, n, 64, dtype="bfloat16") for n in (heads, kv_heads))
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, rows))
        for x in (q, k, k, shape(1, s))
    ]
    run = forward_and_backward(lambda *x, ids: sharded(*x, ids))
    step = jax.jit(lambda q, k, v, ids: run((q, k, v), ids=ids)).trace(*arguments)
    return step.lower(lowering_platforms=("tpu",)).compile(options).as_text()


# Flags (LIBTPU_INIT_ARGS) that let the compiler run a kernel between the start and end of a gather.
OVERLAP = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
    "xla_tpu_async_collective_fusion_with_start_done_only": True,
}


def test_later_rows_are_updated_during_the_gather():
    text = context_parallel_text(
        "v5e:2x2", context_attention.lucid_attention, 8192, 6, 3, **OVERLAP
    )
    events = re.findall(
        r"%(async-collective-start|async-collective-done|lucid_product|lucid_solve|splash)\S* = ",
        text,
    )
    # The bodies of the forward and backward loops: update the block, gather while updating later
    # rows, solve the stripe.
    step = [
        "lucid_product", "async-collective-start", "lucid_product", "async-collective-done",
        "lucid_solve",
    ]  # fmt: skip
    assert events[:10] == [*step, *step]
    assert "splash" in events


@pytest.mark.slow
@pytest.mark.parametrize("topology", SLICES)
@pytest.mark.parametrize("kv_heads", [3, 4])
def test_context_parallelism_compiles_for_every_chip(topology, kv_heads):
    text = context_parallel_text(topology, context_attention.lucid_attention, 131_072, 12, kv_heads)
    assert ("lucid_cross_key_gradient" in text) == (kv_heads == 3)
    assert ("all-to-all" in text) == (kv_heads == 4)
    assert "%lucid_solve" in text
    assert "splash" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "size"),
    [(lucid_1b_128k, size) for size in lucid_1b_128k.SLICES]
    + [(lucid_1b_1m, size) for size in lucid_1b_1m.SLICES],
)
@pytest.mark.parametrize("attention", ["lucid", "softmax"])
def test_long_context_models_use_at_most_70_percent_of_memory(file, size, attention):
    config = file.get_config(size)
    config.model.attention = attention
    chip, shape = size.split("-")
    report = compile_train_step(Config.from_dict(config.to_dict()), f"{chip}:{shape}")
    assert report.fits
    assert sum(report.memory.values()) < 0.7 * report.capacity


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "devices"), [("v5p:2x2x1", 4), ("v6e:4x4", 16)])
def test_the_1b_model_fits(topology, devices):
    report = compile_train_step(Config.from_dict(lucid_1b.get_config().to_dict()), topology)
    assert report.fits
    assert report.parameters == 1_100_048_384
    assert report.devices.startswith(f"{devices} × ")


@pytest.mark.parametrize("topology", ["v9x:2x2", "v5p", "nonsense"])
def test_an_unknown_slice_is_a_one_line_error(topology):
    with pytest.raises(ConfigError, match=r"not known to libtpu; examples are .*v6e:4x4") as error:
        topology_devices(topology)
    assert "\n" not in str(error.value)


def test_a_missing_libtpu_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jax\[tpu\]'"):
        topology_devices("v5e:2x2")


def factorings(n: int, count: int):
    """Yields all tuples of `count` factors whose product is `n`."""
    if count == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        yield from ((first, *rest) for rest in factorings(n // first, count - 1))


@pytest.mark.parametrize(
    "topology",
    [
        "v4:2x2x1", "v4:2x2x4", "v4:4x4x4", "v5e:2x2", "v5e:4x8", "v5e:8x8", "v5e:16x16",
        "v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v6e:2x4", "v6e:4x4", "v6e:8x8", "v6e:16x16",
    ],
)  # fmt: skip
def test_every_mesh_fits_its_slice(topology):
    """Axes of the mesh may be parts of axes of the torus."""
    devices = topology_devices(topology)
    for sizes in factorings(len(devices), len(MESH_AXES)):
        arranged = arrange(sizes, devices)
        assert arranged.shape == sizes
        assert set(arranged.flat) == set(devices)
