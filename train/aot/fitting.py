"""Check whether a run's program fits on a topology, and find a change that makes it fit."""

import dataclasses
import math
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any

import jax

from train.aot.config import CompileConfig, attention_of
from train.aot.program import Program, program_of
from train.aot.report import arguments_of, report_of
from train.aot.topology import Topology
from train.devices.mesh import MeshConfig, make_mesh

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def fit(config: CompileConfig, topology: Topology) -> dict[str, Any]:
    """Compile a config's program for a topology, and report whether the program fits.

    Returns:
        Report of `train.aot.report.report_of`. If the compiler runs out of memory, the report has
        only `fits` (False) and `memory`: bytes of each argument, "needed" and "available".

    Raises:
        ValueError: The config can't be placed on this topology, or does not compile.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    program = program_of(config, mesh, config.what, attention_of(config, topology))
    lowered = program.lower(topology.platform)
    print(f"compiling for {topology.name} ...", file=sys.stderr, flush=True)
    try:
        compiled = lowered.compile(compiler_options=topology.options)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_memory(str(error))
        if needed is None:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"the compiler for {topology.name} gave up: {first}") from error
        available = round(topology.chip.memory)
        memory = {**arguments_of(program), "needed": needed, "available": available}
        return {"fits": False, "memory": memory}
    return report_of(compiled, program, topology, mesh)


def needed_memory(message: str) -> int | None:
    """Parse the bytes of HBM that a program needs from libtpu's error; None if not stated."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    number = re.search(
        r"temporaries \(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?) of \S+ hbm", message
    )
    if number is None:
        return None
    amount, unit = number[1] or number[3], number[2] or number[4]
    return round(float(amount) * UNITS[unit])


def advice(
    config: CompileConfig, topology: Topology, report: dict[str, Any]
) -> dict[str, Any] | None:
    """Try the changes of `remedies` until a config fits.

    Changes that can't save enough memory are skipped without compiling.

    Args:
        config: Config that does not fit.
        topology: Devices to compile for.
        report: Report that `fit` returned for this config.

    Returns:
        Dict of the first change with which the config fits: `options`, the change as command-line
        options, and `peak`, the resulting peak memory in bytes. None if no change suffices.
    """
    state = sum(arguments_of(_program(config, topology)).values())
    excess = {config.model.remat: _excess(report)}
    for change, changed in remedies(config, len(topology.devices)):
        try:
            part = sum(arguments_of(_program(changed, topology)).values())
        except ValueError:
            continue  # the batch or a parameter does not divide over the mesh
        if part > topology.chip.memory:
            continue
        # Sharding the state further saves a part of the state, and as much of the gradients.
        only_state = changed.accumulate == config.accumulate and "--mesh" in change
        if only_state and changed.mesh.tensor == config.mesh.tensor:
            known = excess.get(changed.model.remat)
            if known is not None and 2 * (state - part) < known:
                continue
        print(f"trying {change}", file=sys.stderr, flush=True)
        try:
            tried = fit(changed, topology)
        except ValueError as error:
            print(f"{change}: {error}", file=sys.stderr)
            continue
        if tried["fits"]:
            return {"options": change, "peak": tried["memory"]["peak"]}
        if changed.mesh == config.mesh:
            excess[changed.model.remat] = _excess(tried)
    return None


def _program(config: CompileConfig, topology: Topology) -> Program:
    mesh = make_mesh(config.mesh, topology.devices)
    return program_of(config, mesh, config.what, attention_of(config, topology))


def _excess(report: dict[str, Any]) -> float:
    memory = report["memory"]
    return memory.get("needed", memory.get("peak")) - memory["available"]


def remedies(config: CompileConfig, devices: int) -> Iterator[tuple[str, CompileConfig]]:
    """Yield config changes that save memory, beginning with the changes that slow a run least.

    First, activations are recomputed; then, the state is sharded over all devices; then, gradients
    are accumulated over smaller micro-batches; finally, matrices are sharded over `tensor` too.

    Args:
        config: Config that does not fit.
        devices: Number of devices.

    Yields:
        Pairs of a change, written as options of the command line, and the changed config.
    """
    sizes = [size for size in dataclasses.asdict(config.mesh).values() if size != -1]
    rest = devices // max(math.prod(sizes), 1)
    data, fsdp, tensor = (rest if size == -1 else size for size in dataclasses.astuple(config.mesh))
    step = config.what == "step"
    kinds = typing.get_type_hints(type(config.model)) if _has_field(config.model, "remat") else {}
    policies = typing.get_args(kinds.get("remat"))
    stricter = policies[policies.index(config.model.remat) + 1 :] if step and policies else ()
    remats = [(f"--model.remat {name}", {"remat": name}) for name in stricter]
    same = ("", {})
    meshes = [("", config.mesh)]
    if data > 1 and step:
        meshes.append(_mesh_change(1, data * fsdp, tensor))
    for mesh_option, mesh in meshes:
        for remat_option, change in [same, *remats]:
            if mesh_option or remat_option:
                yield _change(config, change, mesh, 1, mesh_option, remat_option)
    remat_option, change = remats[-1] if remats else same
    mesh_option, mesh = meshes[-1]
    for parts in (2, 4, 8) if step else ():
        option = f"--accumulate {config.accumulate * parts}"
        yield _change(config, change, mesh, parts, mesh_option, remat_option, option)
    for split in (2, 4, 8):
        if (data * fsdp) % split == 0:
            rows = (1, data * fsdp // split) if step else (data * fsdp // split, 1)
            mesh_option, mesh = _mesh_change(*rows, tensor * split)
            yield _change(config, change, mesh, 1, mesh_option, remat_option)


def _has_field(model: Any, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(model)}


def _mesh_change(data: int, fsdp: int, tensor: int) -> tuple[str, MeshConfig]:
    options = f"--mesh.data {data} --mesh.fsdp {fsdp} --mesh.tensor {tensor}"
    return options, MeshConfig(data, fsdp, tensor)


def _change(
    config: CompileConfig, model: dict[str, Any], mesh: MeshConfig, parts: int, *options: str
) -> tuple[str, CompileConfig]:
    changed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        mesh=mesh,
        accumulate=config.accumulate * parts,
    )
    return " ".join(filter(None, options)), changed
