"""Collectives and buffers are read from compiled programs."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lucid_jax.training.hlo import Traffic, buffers, collectives

DEVICES = 4


def compile_on_devices(f, *shapes, **options):
    mesh = jax.sharding.Mesh(jax.devices()[:DEVICES], "x")
    spec = PartitionSpec("x")
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(run).lower(*shapes).compile(options)


def test_collectives_count_by_kind_and_iteration():
    def f(x):  # float32 [8,16] on each device
        def step(x, _):
            return jnp.sin(jax.lax.psum(x, "x")), None

        x, _ = jax.lax.scan(step, x, length=5)
        x = jax.lax.ppermute(x, "x", [(i, (i + 1) % DEVICES) for i in range(DEVICES)])
        gathered = jax.lax.all_gather(x.astype(jnp.bfloat16), "x", tiled=True)
        return jax.lax.all_to_all(gathered, "x", 0, 0, tiled=True)

    compiled = compile_on_devices(f, jax.ShapeDtypeStruct((DEVICES * 8, 16), jnp.float32))
    found = collectives(compiled.as_text())
    assert found["all-reduce"] == Traffic(5, 5 * 8 * 16 * 4)
    assert found["collective-permute"] == Traffic(1, 8 * 16 * 4)
    assert found["all-to-all"].count == 1
    assert found["all-gather"].count == 1
    # The CPU may send float32 instead.
    assert found["all-gather"].bytes in (DEVICES * 8 * 16 * 2, DEVICES * 8 * 16 * 4)


def test_an_asynchronous_gather_counts_once():
    text = """
%started (p: f32[2]) -> (f32[2], f32[8]) {
  %all-gather.1 = f32[8]{0} all-gather(%p), channel_id=1
  ROOT %a = (f32[2], f32[8]) custom-call(%p), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (p: f32[2]) -> (f32[8], f32[4]) {
  %all-gather.2 = f32[8]{0} all-gather(%p), channel_id=1
}

%ended (p: f32[2]) -> f32[8] {
  %all-gather.3 = f32[8]{0} all-gather(%p), channel_id=1
  ROOT %b = f32[8]{0} custom-call(%p), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[2]) -> f32[8] {
  %async-collective-start = (f32[2], f32[8]) fusion(%p), kind=kCustom, calls=%started
  %fusion = (f32[8], f32[4]) fusion(%p), kind=kOutput, calls=%async_collective_fusion.7
  ROOT %async-collective-done = f32[8]{0} fusion(%p), kind=kCustom, calls=%ended
}
"""
    assert collectives(text) == {"all-gather": Traffic(1, 8 * 4)}


def test_a_program_on_one_device_has_no_collectives():
    assert collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()) == {}


def test_the_largest_buffer_has_the_name_of_its_operation(tmp_path):
    def f(x):
        with jax.named_scope("outer"):
            square = jnp.sin(jnp.outer(x, x))
            return square @ jnp.cos(square)

    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    jax.jit(f).lower(jax.ShapeDtypeStruct((1024,), jnp.float32)).compile(options)
    total, lines = buffers(tmp_path)
    assert total >= 2 * 1024 * 1024 * 4
    assert "f32[1024,1024]" in lines[0]
    assert "outer" in lines[0]
