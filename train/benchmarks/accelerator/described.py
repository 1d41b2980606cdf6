"""Compile the benchmark's programs for accelerators that are not attached."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.aot.program import Program, What, program_of
from train.aot.report import memory_of
from train.aot.topology import Topology, topology_of
from train.benchmarks.accelerator.kernels import implementations, with_gradients
from train.benchmarks.accelerator.record import Record
from train.benchmarks.accelerator.sizes import KernelShape, full_sizes, tiny_sizes
from train.benchmarks.accelerator.training import run_config
from train.devices.attention import Attention
from train.devices.mesh import MeshConfig, make_mesh


def compile_for(name: str, folder: Path, tiny: bool) -> None:
    """Compile kernels, train steps and decoding steps for one device of a topology.

    The memory that the programs need is written to `compiled_TOPOLOGY.json`, in the format of the
    parts' files. cuDNN's kernel is left out: jax can't query what the cuDNN of an unattached GPU
    supports.

    Args:
        name: Topology such as "v5e:2x2" or "h100:1".
        folder: Folder of the results.
        tiny: Whether to compile kernels and models of tiny sizes.

    Raises:
        ValueError: The topology is unknown, its compiler is not installed, or the folder's results
            are of other sizes.
    """
    # Programs are only compiled: an attached device should stay free.
    jax.config.update("jax_platforms", "cpu")
    # Cached programs can't be loaded without the device.
    jax.config.update("jax_enable_compilation_cache", False)
    topology = topology_of(name)
    device = topology.devices[0].device_kind
    part, sizes = f"compiled_{name.replace(':', '_')}", tiny_sizes() if tiny else full_sizes()
    record = Record(folder, part, float("inf"), device, tiny)
    mesh = make_mesh(MeshConfig(1, 1, 1), topology.devices[:1])
    for shape in sizes.kernels:
        for biased in (False, True):
            for kernel, function in implementations(topology.platform).items():
                if kernel != "cudnn":
                    compile_one = functools.partial(_kernel, function, shape, biased)
                    label = f"{kernel} {shape}{' bias' if biased else ''}"
                    record.measure(label, functools.partial(compile_one, topology, mesh))
    attention: Attention = "splash" if topology.platform == "tpu" else "xla"
    programs: dict[What, dict[str, Any]] = {"step": sizes.models, "decode": sizes.decoders}
    for kind, configs in programs.items():
        batches = (sizes.first_batch,) if kind == "step" else sizes.decode_batches
        for label, model in configs.items():
            for batch in batches:
                length = sizes.seq_len if kind == "step" else sizes.context + sizes.new_tokens
                run = run_config(model, batch, length)
                make = functools.partial(program_of, run, mesh, kind, attention)
                work = functools.partial(_program, make, topology)
                record.measure(f"{kind} {label} batch {batch}", work)
    record.finish()


def _program(make: Callable[[], Program], topology: Topology) -> dict[str, Any]:
    """Compile a program, and return the bytes of memory that it needs (see `memory_of`)."""
    program = make()
    compiled = program.lower(topology.platform).compile(compiler_options=topology.options)
    return memory_of(compiled, program, topology.platform)


def _kernel(
    function: Any, shape: KernelShape, biased: bool, topology: Topology, mesh: Mesh
) -> dict[str, Any]:
    """Compile a kernel with its gradients, and return the bytes of its `temporaries`."""
    whole = NamedSharding(mesh, P())

    def like(heads: int) -> jax.ShapeDtypeStruct:
        sizes = (shape.batch, shape.slots, heads, shape.width)
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=whole)

    bias = jax.ShapeDtypeStruct((shape.batch, shape.slots), jnp.float32, sharding=whole)
    inputs = like(shape.heads), like(shape.kv_heads), like(shape.kv_heads), bias if biased else None
    traced = jax.jit(with_gradients(function)).trace(*inputs, like(shape.heads))
    lowered = traced.lower(lowering_platforms=(topology.platform,))
    stats: Any = lowered.compile(compiler_options=topology.options).memory_analysis()
    return {"temporaries": stats.temp_size_in_bytes}
