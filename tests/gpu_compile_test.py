"""Triton's compiler and ptxas accept every kernel; no GPU is needed."""

import functools
import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lucid_jax import Prefix, Transitions, lucid_attention, precondition, softmax_attention
from lucid_jax.ops.decode import LayerCache, decode_attention
from lucid_jax.ops.precondition.carry_triton import carry, invert_unit_lower
from lucid_jax.ops.precondition.triton_schedule import Schedule
from lucid_jax.parallel import context_attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="jax's CUDA plugin is missing"
)

# The properties of a GPU that the compilers read, in XLA's format: name, compute capability, bytes
# of shared memory of a program and of a multiprocessor (NVIDIA's CUDA C++ Programming Guide), and
# the number of multiprocessors.
GPUS = {
    "H200": (
        "NVIDIA H200",
        "major: 9 feature_extension: ACCELERATED_FEATURES",
        232448,
        233472,
        132,
    ),
    "L4": ("NVIDIA L4", "major: 8 minor: 9", 101376, 102400, 58),
}
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {program}
  shared_memory_per_core: {core} core_count: {cores} fpus_per_core: 128
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  clock_rate_ghz: 2 l2_cache_size: 50000000 memory_bandwidth: 300000000000
  device_memory_size: 20000000000 cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
ROWS, WHOLE = PartitionSpec(None, "x"), PartitionSpec()


def compile_for(devices: int, f, *shapes, spec=WHOLE, gpu="H200"):
    """Compiles `f` for several GPUs and returns the text; the shapes are global."""
    names = ("name", "capability", "program", "core", "cores")
    topology = topologies.get_topology_desc(
        gpu,
        platform="cuda",
        target_config=DESCRIPTION.format(**dict(zip(names, GPUS[gpu]))),
        topology=f"1x1x{devices}",
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), "x", axis_types=(AxisType.Auto,))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
    )
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile().as_text()


def shape(*sizes, dtype="int32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def kernels(text: str) -> set[str]:
    """Returns the names of the kernels in the text of a program."""
    return set(re.findall(r"lucid_\w+(?=\)*/pallas_call)", text))


OP = {"lucid_diagonal_inverses", "lucid_solve", "lucid_solve_transposed", "lucid_key_gradient"}


@pytest.mark.parametrize(
    ("gpu", "dtype", "s", "d", "packed", "x64", "heads"),
    [
        ("H200", "bfloat16", 99999, 64, True, False, 2),
        ("H200", "float16", 1000, 128, True, True, 1),
        ("L4", "bfloat16", 1000, 256, False, False, 2),
        *(
            pytest.param(*case, 2, marks=pytest.mark.slow)
            for case in (
                ("H200", "bfloat16", 1000, 64, False, True),
                ("H200", "bfloat16", 1000, 128, True, False),
                ("H200", "bfloat16", 99999, 128, False, True),
                ("H200", "bfloat16", 1000, 256, False, False),
                ("H200", "float16", 99999, 64, True, True),
                ("H200", "float16", 99999, 128, True, True),
                ("H200", "float16", 1000, 256, True, False),
                ("H200", "float32", 1000, 68, True, False),
                ("H200", "float32", 1000, 256, False, True),
                ("L4", "bfloat16", 99999, 64, True, False),
                ("L4", "float16", 1000, 128, True, False),
                ("L4", "float32", 1000, 64, True, False),
                ("L4", "float32", 1000, 128, True, False),
                ("L4", "float32", 1000, 256, True, False),
            )
        ),
    ],
)
def test_kernels_compile_forward_and_backward(gpu, dtype, s, d, packed, x64, heads):
    b = heads  # A single head of a single sequence has its own tiles.
    x, ids = shape(b, s, heads, d, dtype=dtype), shape(b, s) if packed else None
    prefix = Prefix(x, x, ids, shape(b))

    def run(k, v, ids, prefix):
        def op(k, v, prefix):
            return precondition(k, v, segment_ids=ids, prefix=prefix, implementation="triton")

        y, pull_back = jax.vjp(op, k, v, prefix)
        return pull_back(y)[:2]

    with jax.enable_x64(x64):
        text = compile_for(1, run, x, x, ids, prefix, gpu=gpu)
    assert kernels(text) >= OP | {"lucid_product"}, kernels(text)


@pytest.mark.parametrize(
    ("gpu", "dtype", "s", "d"),
    [
        ("H200", "bfloat16", 1000, 64),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("H200", "bfloat16", 99999, 64),
                ("H200", "bfloat16", 99999, 128),
                ("H200", "bfloat16", 1000, 256),
                ("H200", "float32", 1000, 128),
                ("L4", "bfloat16", 1000, 128),
            )
        ),
    ],
)
def test_solves_with_beta_compile(gpu, dtype, s, d):
    """With β the inverses depend on it, and 16-bit products are in bfloat16, not float16."""
    x, ids, beta = shape(2, s, 2, d, dtype=dtype), shape(2, s), shape(2, s, 2, dtype=dtype)

    def run(k, v, ids, beta):
        def op(k, v, beta):
            return precondition(k, v, segment_ids=ids, beta=beta, implementation="triton")

        y, pull_back = jax.vjp(op, k, v, beta)
        return pull_back(y)

    assert kernels(compile_for(1, run, x, x, ids, beta, gpu=gpu)) >= OP


@pytest.mark.parametrize(
    ("gpu", "dtype", "s", "d", "packed"),
    [
        ("H200", "bfloat16", 99999, 64, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("H200", "bfloat16", 1000, 64, True),
                ("H200", "float16", 1000, 128, False),
                ("H200", "bfloat16", 1000, 256, True),
                ("H200", "float32", 1000, 68, True),
                ("H200", "bfloat16", 99999, 68, True),
                ("L4", "bfloat16", 1000, 64, True),
                ("L4", "float16", 1000, 128, True),
                ("L4", "bfloat16", 1000, 256, True),
                ("L4", "float32", 1000, 64, True),
                ("L4", "float32", 1000, 128, True),
                ("L4", "float32", 1000, 256, True),
            )
        ),
    ],
)
def test_softmax_attention_compiles_forward_and_backward(gpu, dtype, s, d, packed):
    q, x = shape(2, s, 6, d, dtype=dtype), shape(2, s, 2, d, dtype=dtype)

    def run(q, k, v, ids):
        def op(q, k, v):
            return softmax_attention(q, k, v, segment_ids=ids, implementation="triton")

        o, pull_back = jax.vjp(op, q, k, v)
        return pull_back(o)

    found = kernels(compile_for(1, run, q, x, x, shape(2, s) if packed else None, gpu=gpu))
    names = {"lucid_attention", "lucid_attention_query_gradient", "lucid_attention_key_gradient"}
    assert found == names


@pytest.mark.parametrize(
    ("gpu", "dtype", "s", "d"),
    [
        ("H200", "bfloat16", 1000, 64),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("H200", "bfloat16", 99999, 128),
                ("H200", "float16", 1000, 68),
                ("L4", "bfloat16", 1000, 256),
                ("L4", "float32", 1000, 256),
            )
        ),
    ],
)
def test_lucid_path_compiles_forward_and_backward(gpu, dtype, s, d):
    q, x = shape(2, s, 4, d, dtype=dtype), shape(2, s, 2, d, dtype=dtype)

    def run(q, k, v, ids, transitions):
        def op(q, k, v, transitions):
            return lucid_attention(
                q, k, v, segment_ids=ids, transitions=transitions, implementation="triton"
            )

        o, pull_back = jax.vjp(op, q, k, v, transitions)
        return pull_back(o)

    transitions = Transitions(x, shape(2, s, 2, dtype=dtype))
    found = kernels(compile_for(1, run, q, x, x, shape(2, s), transitions, gpu=gpu))
    attention = "lucid_path_attention"
    gradients = {f"{attention}_{name}_gradient" for name in ("query", "key")}
    solve = {"lucid_solve", "lucid_solve_transposed", "lucid_level_gradient", "lucid_inverses"}
    carry = {"lucid_carry_levels", "lucid_carry_levels_gradient"} if d <= 128 else set()
    assert found == {attention, *gradients, *solve, *carry}


@pytest.mark.parametrize(
    ("gpu", "dtype", "d"),
    [
        ("H200", "bfloat16", 64),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("H200", "bfloat16", 128),
                ("H200", "float16", 68),
                ("L4", "bfloat16", 128),
                ("L4", "float32", 128),
            )
        ),
    ],
)
def test_vectors_are_carried_to_every_level(gpu, dtype, d):
    group, x = 2, shape(2, 2, 5, 64, d, dtype="float32")
    matrices = [shape(2, 2, n, d, d, dtype="float32") for n in (6, 4)]

    def run(x, q, tree):
        solve = carry(x, x, tree, dtype)
        found = [solve, carry(q, None, tree, dtype)]
        return invert_unit_lower(x[..., :64]), [
            pull_back(y.astype("float32")) for y, pull_back in found
        ]

    q = shape(2, 2 * group, 5, 64, d, dtype="float32")
    found = kernels(compile_for(1, run, x, q, matrices, gpu=gpu))
    assert found == {"lucid_carry_levels", "lucid_carry_levels_gradient", "lucid_inverses"}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax is older than 0.11")
@pytest.mark.parametrize(
    "d", [64, pytest.param(68, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)]
)
def test_mosaic_gpu_kernels_compile_forward_and_backward(d):
    x = shape(1, 1000, 2, d, dtype="bfloat16")

    def run(k, v):
        y, pull_back = jax.vjp(functools.partial(precondition, implementation="mosaic_gpu"), k, v)
        return pull_back(y)

    text = compile_for(1, run, x, x)
    assert {"lucid_solve_mosaic_gpu", "lucid_key_gradient_mosaic_gpu"} <= set(
        re.findall(r"lucid_\w+", text)
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax is older than 0.11")
@pytest.mark.parametrize(
    "d", [64, pytest.param(68, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("is_packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_attention_compiles_by_mosaic_gpu(d, is_packed):
    q, k = shape(1, 1000, 4, d, dtype="bfloat16"), shape(1, 1000, 2, d, dtype="bfloat16")
    attend = functools.partial(softmax_attention, implementation="mosaic_gpu")

    def run(q, k, ids):
        o, pull_back = jax.vjp(functools.partial(attend, segment_ids=ids), q, k, k)
        return pull_back(o)

    text = compile_for(1, run, q, k, shape(1, 1000) if is_packed else None)
    for name in ("attention", "attention_query_gradient", "attention_key_gradient"):
        assert f"lucid_{name}_mosaic_gpu" in text


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax is older than 0.11")
def test_one_thread_draws_whatever_else_is_lowered_meanwhile(monkeypatch):
    # jax has a global that says whether code is for one thread; another lowering may have set it.
    utils = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    monkeypatch.setattr(utils, "_ONCE_PER", utils.ThreadSubset.WARPGROUP, raising=False)
    inline_ptx, draws = utils.inline_ptx, []

    def spy(ptx, *arguments, **options):
        if "atom." in ptx:
            draws.append(utils.ir.InsertionPoint.current.block.owner.name)
        return inline_ptx(ptx, *arguments, **options)

    monkeypatch.setattr(utils, "inline_ptx", spy)
    x = shape(1, 300, 1, 64, dtype="bfloat16")
    compile_for(1, functools.partial(precondition, implementation="mosaic_gpu"), x, x)
    assert draws
    assert set(draws) == {"scf.if"}


@pytest.mark.parametrize("reverse", [False, True])
def test_the_solve_compiles_by_jax_triton(reverse, monkeypatch):
    jax_triton = pytest.importorskip("jax_triton", reason="needs jax-triton (.ci/requirements.txt)")
    from experiments.jax_triton.solve import solve

    call = functools.partial(jax_triton.triton_call, compute_capability=90)
    monkeypatch.setattr(jax_triton, "triton_call", call)
    tiles = Schedule.choose("NVIDIA H200", jnp.dtype("bfloat16"), 1, 131072, 4, 64).solve
    x, blocks = shape(1, 1000, 4, 64, dtype="bfloat16"), -(-1000 // tiles.rows)
    k_hat = shape(1, 4, blocks * tiles.rows, 64, dtype="float16")
    inverses = shape(1, 4, blocks, 2, tiles.rows, tiles.rows, dtype="bfloat16")
    text = compile_for(
        1, functools.partial(solve, tiles=tiles, reverse=reverse), k_hat, inverses, x, x
    )
    assert "triton_kernel_call" in text


@pytest.mark.parametrize(
    ("gpu", "capability", "s", "heads", "d"),
    [("H200", 90, 65536, 4, 64), ("H200", 90, 32768, 16, 128), ("L4", 89, 65536, 4, 64)],
)
def test_precondition_compiles_by_jax_triton(gpu, capability, s, heads, d, monkeypatch):
    jax_triton = pytest.importorskip("jax_triton", reason="needs jax-triton (.ci/requirements.txt)")
    from jax_triton import triton_lib

    from experiments.jax_triton import trial

    call = functools.partial(jax_triton.triton_call, compute_capability=capability)
    monkeypatch.setattr(jax_triton, "triton_call", call)
    library, shared = triton_lib.triton_kernel_call_lib, []
    make = library.TritonKernel

    def spy(name, warps, ctas, size, *code):
        shared.append(size)
        return make(name, warps, ctas, size, *code)

    monkeypatch.setattr(library, "TritonKernel", spy)

    def run(k, v, y_bar):
        y, pull_back = jax.vjp(trial.precondition, k, v)
        return y, pull_back(y_bar)

    x = shape(1, s, heads, d, dtype="bfloat16")
    assert compile_for(1, run, x, x, x, gpu=gpu).count("triton_kernel_call") >= 4
    # A launch fails where a kernel wants more shared memory than a block can have.
    assert 0 < max(shared) <= GPUS[gpu][2]


def test_both_passes_share_one_kernel_for_the_inverses():
    def run(k, v):
        y, pull_back = jax.vjp(functools.partial(precondition, implementation="triton"), k, v)
        return pull_back(y)

    x = shape(1, 100, 1, 16, dtype="bfloat16")
    lines = [x for x in compile_for(1, run, x, x).splitlines() if "lucid_diagonal_inverses" in x]
    calls = [x.partition("backend_config=")[2] for x in lines if "custom_call_target" in x]
    # The backward pass computes them again; both calls are equal, so they compile once.
    assert len(calls) == 2
    assert len(set(calls)) == 1


@pytest.mark.parametrize(
    ("dtype", "size", "d", "group", "lucid", "with_beta"),
    [
        ("bfloat16", 131072, 64, 8, True, False),
        ("bfloat16", 2000, 64, 8, False, False),
        ("float16", 2000, 68, 3, True, True),
        ("float32", 2000, 256, 20, True, False),
    ],
)
def test_a_decode_step_compiles(dtype, size, d, group, lucid, with_beta):
    b, heads = 2, 4
    cache, row = shape(b, heads, size, d, dtype=dtype), shape(b, heads, d, dtype=dtype)
    norms = shape(b, heads, size, dtype="float32") if lucid else None
    q = shape(b, heads * group, d, dtype=dtype)
    beta = shape(b, heads, dtype=dtype) if with_beta else None

    def run(beta, *arguments):
        return decode_attention(*arguments, beta=beta, implementation="triton")

    text = compile_for(1, run, beta, q, row, row, LayerCache(cache, cache, norms), shape(b))
    assert kernels(text) == {"lucid_decode", "lucid_decode_finish"}


@pytest.mark.parametrize(
    ("stripe", "d", "packed", "uses_inverses"),
    [
        (256, 64, False, True),
        pytest.param(256, 256, False, False, marks=pytest.mark.slow),
        pytest.param(128, 64, True, False, marks=pytest.mark.slow),
        pytest.param(2048, 128, True, True, marks=pytest.mark.slow),
    ],
)
def test_context_parallelism_compiles_forward_and_backward(stripe, d, packed, uses_inverses):
    x, ids = shape(1, 32768, 1, d, dtype="bfloat16"), shape(1, 32768) if packed else None

    def run(k, v, ids):
        def op(k, v):
            return context_attention.precondition(
                k, v, axis_name="x", stripe=stripe, segment_ids=ids, implementation="triton"
            )

        y, pull_back = jax.vjp(op, k, v)
        return pull_back(y)

    found = kernels(compile_for(2, run, x, x, ids, spec=ROWS))
    assert ("lucid_solve_by_inverse" in found) == uses_inverses, found
    assert ("lucid_solve" in found) != uses_inverses, found


def test_later_rows_are_updated_during_the_gather():
    x = shape(2, 1024, 3, 64, dtype="bfloat16")

    def run(k, v):
        return context_attention.precondition(
            k, v, axis_name="x", stripe=128, implementation="triton"
        )

    text = compile_for(2, run, x, x, spec=ROWS)
    events = [
        event
        for line in text.splitlines()
        for event in ("all-gather-start", "all-gather-done", "lucid_product", "lucid_solve")
        if re.search(rf" {event}\(", line) or ("custom-call(" in line and event in line)
    ]
    # The loop body: update the block, gather while updating later rows, solve the stripe.
    step = ["lucid_product", "all-gather-start", "lucid_product", "all-gather-done", "lucid_solve"]
    assert any(events[i : i + 5] == step for i in range(len(events))), (events, text)


def test_a_script_prints_no_warning_of_a_deprecated_lowering():
    script = """
import gpu_compile_test
from lucid_jax import precondition
x = gpu_compile_test.shape(1, 128, 1, 64, dtype="bfloat16")
gpu_compile_test.compile_for(1, lambda k, v: precondition(k, v, implementation="triton"), x, x)
print("compiled")
"""
    tests = pathlib.Path(__file__).parent
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (tests, tests.parent))))
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr
    assert "Warning" not in done.stderr
