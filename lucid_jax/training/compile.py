"""Compiles the training step of a run, also for devices that are absent, and reports its needs."""

import dataclasses
import importlib.util
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence

import jax
from absl import logging
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from lucid_jax.config import Config, ConfigError
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.parallel.mesh import Layout, make_layout
from lucid_jax.training.flops import flops_per_token
from lucid_jax.training.hlo import Traffic, buffers, collectives
from lucid_jax.training.step import Trainer

# Settings with which libtpu works without a TPU.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Without these libtpu logs errors; any slice will do.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}
_EXAMPLES = "v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4"


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """The memory, operations and traffic of one device in a training step.

    Attributes:
      devices: Number and kind of the devices.
      seconds: Compilation time.
      memory: Bytes by kind; if compilation failed for lack of memory, the bytes needed.
      capacity: Bytes of the device's memory, None if unknown.
      flops: Model FLOPs of a step, see `training/flops.py`.
      largest: The largest buffers, as the compiler names them, if the step does not fit.
    """

    devices: str
    mesh: dict[str, int]
    parameters: int
    seconds: float
    memory: dict[str, int]
    capacity: int | None
    fits: bool
    flops: float
    traffic: dict[str, Traffic]
    largest: tuple[str, ...] = ()

    def table(self) -> str:
        """Returns the report as lines for a terminal."""
        lines = [
            f"{self.devices}, mesh {', '.join(f'{k} {n}' for k, n in self.mesh.items())};"
            f" {self.parameters:,} parameters; compiled in {self.seconds:.0f} s",
            "",
            "memory of a device",
            *(f"  {kind:22} {_size(n):>10}" for kind, n in self.memory.items()),
            f"  {'total':22} {_size(sum(self.memory.values())):>10}",
        ]
        if self.capacity:
            lines.append(f"  {'capacity':22} {_size(self.capacity):>10}")
        lines.append("it fits" if self.fits else "it does NOT fit")
        if self.largest:
            lines += ["", "largest buffers", *(f"  {buffer}" for buffer in self.largest)]
        lines += ["", f"model FLOPs of a device and step: {self.flops:.3e}"]
        if self.fits:
            lines += ["", "collectives of a device and step"]
            lines += [
                f"  {kind:22} {t.count:6} {_size(t.bytes):>10}" for kind, t in self.traffic.items()
            ] or ["  none"]
        return "\n".join(lines)


def compile_train_step(config: Config, topology: str | None) -> CompileReport:
    """Compiles the whole training step; needs neither data nor memory for the parameters.

    Args:
      topology: The TPU slice to compile for, in libtpu's names such as `"v5p:2x2x1"`, or None
        for the devices of this process.

    Raises:
      ConfigError: the topology is unknown or libtpu is missing, or the configuration does not
        fit the devices.
    """
    devices = jax.devices() if topology is None else topology_devices(topology)
    layout = make_layout(config, devices)
    model = LanguageModel.build(config.model, layout)
    trainer = Trainer.build(config, model)
    start = time.perf_counter()
    traced = trainer.make_step().trace(trainer.abstract_state, trainer.abstract_batch)
    lowered = traced.lower(lowering_platforms=(devices[0].platform,))
    logging.info("compiling for %d × %s", len(devices), devices[0].device_kind)
    with tempfile.TemporaryDirectory() as dump:
        try:
            compiled = lowered.compile({"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled = None
        needed, largest = buffers(pathlib.Path(dump))
    if compiled is None:
        memory, traffic = {"needed": needed}, {}
    else:
        stats = compiled.memory_analysis()
        memory = {
            "arguments": stats.argument_size_in_bytes,
            "results, not in place": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        }
        traffic = collectives(compiled.as_text())
    capacity = _capacity(layout)
    fits = compiled is not None and (capacity is None or sum(memory.values()) <= capacity)
    length = config.data.sequence_length
    tokens = config.batch_size * length
    return CompileReport(
        devices=f"{len(devices)} × {devices[0].device_kind}",
        mesh=dict(layout.mesh.shape),
        parameters=model.num_params,
        seconds=time.perf_counter() - start,
        memory=memory,
        capacity=capacity,
        fits=fits,
        flops=tokens * flops_per_token(config.model, length) / len(devices),
        traffic=traffic,
        largest=() if fits else largest,
    )


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Returns the devices of a TPU slice that this process may not have."""
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError(
            "--topology needs libtpu, the compiler of TPUs, which runs on any Linux machine:"
            " pip install 'jax[tpu]'"
        )
    # Without this, jax would wait for a TPU of this machine that another process has.
    jax.config.update("jax_platforms", "cpu")
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    # Wherever jax runs, the two cores of a v4 chip are one device; here this is not the default.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except Exception as error:  # libtpu's errors have no type of their own.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--topology={topology!r} is not known to libtpu; examples are {_EXAMPLES}: {first}"
        ) from error


def _capacity(layout: Layout) -> int | None:
    device = layout.mesh.devices.flat[0]
    if device.platform == "tpu":
        with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
            info = pltpu.get_tpu_info()
        return info.hbm_capacity_bytes * info.num_cores
    stats = device.memory_stats()
    return stats["bytes_limit"] if stats else None


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
