"""The compile report of a program: memory, collectives and roofline, as data and as text."""

import dataclasses
from collections import defaultdict
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from train.aot.config import CompileConfig, attention_of
from train.aot.hlo import KINDS, Collective, collectives_of
from train.aot.program import Program
from train.aot.topology import Topology, link_bandwidth
from train.devices.attention import resolve
from train.devices.hardware import GIB
from train.devices.mesh import make_mesh, shard_bytes

LARGEST = 6
ASSUMPTIONS = (
    "compute: the model's FLOPs, and what remat computes again, at the chip's bfloat16 peak",
    "HBM: arguments read and state written once; temporaries of the peak, and what the links",
    "  bring, written and read once",
    "links: what a device must receive, over all links of the torus dimensions that a group spans",
    "  (GPUs: NVLink, and between hosts the network cards of all members), one after another",
    "bounds, not forecasts: a step takes at least the longest of the three",
)


def arguments_of(program: Program) -> dict[str, int]:
    """Return the bytes per device of each entry of `program.arguments`, keyed by its name."""
    return {name: shard_bytes(tree) for name, tree in program.arguments.items()}


def memory_of(compiled: jax.stages.Compiled, program: Program, platform: str) -> dict[str, int]:
    """Forecast the memory that a compiled program needs on each device, in bytes.

    Args:
        compiled: Executable of the program.
        program: Program that was compiled.
        platform: Platform that the program was compiled for, such as "tpu" or "cuda".

    Returns:
        Mapping from names to bytes: each argument, the "padding" of the arguments, "temporaries",
        "results" that reuse no donated argument, the code of the "program", and "peak", the sum of
        all other entries.
    """
    stats: Any = compiled.memory_analysis()
    by_argument = arguments_of(program)
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # libtpu lets buffers that are not live at the same time share memory, and checks the peak. On a
    # GPU, the temporaries are one block.
    live = stats.peak_memory_in_bytes - stats.argument_size_in_bytes - results
    memory = {
        **by_argument,
        "padding": max(stats.argument_size_in_bytes - sum(by_argument.values()), 0),
        "temporaries": live if platform == "tpu" else stats.temp_size_in_bytes,
        "results": results,
        "program": stats.generated_code_size_in_bytes,
    }
    return memory | {"peak": sum(memory.values())}


def sharding_table(params: Any) -> list[dict[str, Any]]:
    """Describe how each parameter of an nnx.State is sharded.

    Returns:
        List with a dict for each parameter: `name`, `shape`, `spec` (the entries of the
        PartitionSpec) and `per_device` (shape on each device).
    """
    rows = []
    for path, variable in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    ):
        leaf = variable.get_value()
        rows.append(
            {
                "name": jax.tree_util.keystr(path, simple=True, separator="/"),
                "shape": list(leaf.shape),
                "spec": [axis for axis in leaf.sharding.spec],
                "per_device": list(leaf.sharding.shard_shape(leaf.shape)),
            }
        )
    return rows


def report_of(
    compiled: jax.stages.Compiled, program: Program, topology: Topology, mesh: Mesh
) -> dict[str, Any]:
    """Report memory, collectives, FLOPs, roofline and sharding of a compiled program.

    Args:
        compiled: Executable of the program.
        program: Program that was compiled.
        topology: Devices that the program was compiled for.
        mesh: Mesh of the topology's devices.

    Returns:
        JSON-serializable dict with sizes in bytes per device and times in seconds per execution:
        `fits`, `memory` (see `memory_of`, and "available"), `collectives`, `flops`, `roofline` and
        `sharding` (see `sharding_table`).
    """
    chip, by_argument = topology.chip, arguments_of(program)
    memory = memory_of(compiled, program, topology.platform) | {"available": round(chip.memory)}
    found = collectives_of(compiled.as_text() or "", mesh.size)
    devices = list(mesh.devices.flat)
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    timed: list[tuple[float, Collective]] = []
    for collective in found.items:
        bandwidth = link_bandwidth(chip, devices, collective.group)
        seconds = collective.times * collective.received / bandwidth
        kind = kinds[collective.kind]
        kind["operations"] += 1
        kind["executions"] += collective.times
        kind["bytes"] += collective.times * collective.size
        kind["received"] += collective.times * collective.received
        kind["seconds"] += seconds
        timed.append((seconds, collective))
    timed.sort(key=lambda pair: -pair[0])
    received = sum(kind["received"] for kind in kinds.values())
    traffic = sum(by_argument.values()) + sum(by_argument[name] for name in program.rewritten)
    traffic += 2 * (memory["temporaries"] + received)
    bounds = {
        "compute": (program.flops + program.recomputed) / mesh.size / chip.flops,
        "HBM": traffic / chip.memory_bandwidth,
        "links": sum(kind["seconds"] for kind in kinds.values()),
    }
    slowest = max(bounds, key=lambda name: bounds[name])
    return {
        "fits": memory["peak"] <= memory["available"],
        "memory": memory,
        "collectives": {
            "kinds": {name: dict(kinds[name]) for name in KINDS if name in kinds},
            "largest": [
                {**dataclasses.asdict(item), "group": len(item.group), "seconds": seconds}
                for seconds, item in timed[:LARGEST]
            ],
            "loops_of_unknown_length": found.unknown_loops,
        },
        "flops": {"model": program.flops, "recomputed": program.recomputed},
        "roofline": {
            **bounds,
            "bound": slowest,
            "step": bounds[slowest],
            "tokens_per_second": program.tokens / bounds[slowest],
            "mfu_at_most": program.flops / mesh.size / chip.flops / bounds[slowest],
            "assumptions": ASSUMPTIONS,
        },
        "sharding": sharding_table(program.arguments["parameters"]),
    }


def heading(config: CompileConfig, topology: Topology) -> str:
    """Format the compiled model, its program and the devices as lines of text."""
    model, mesh = config.model, make_mesh(config.mesh, topology.devices)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    if config.what == "step":
        work = (
            f"train step of {config.batch_size} rows of {config.data.seq_len} tokens "
            f"(accumulate {config.accumulate}), {_execution(model)}attention "
            f"{resolve(model, mesh, attention_of(config, topology))}"
        )
    else:
        work = f"decode step of {config.batch_size} rows, capacity {config.data.seq_len} tokens"
    return (
        f"{model.num_params():,} parameters, {model.summary()}, {model.dtype}\n"
        f"{work}\n"
        f"{topology.name}: {mesh.size} x {topology.devices[0].device_kind} ({sizes}); "
        f"jax {jax.__version__}"
    )


def text_of(report: dict[str, Any]) -> str:
    """Format the report of `report_of` as text, for a terminal."""
    memory, roofline, flops = report["memory"], report["roofline"], report["flops"]
    peak, available = memory["peak"], memory["available"]
    lines = [
        _verdict(report["fits"], peak, available),
        "",
        f"{'memory of each device':28}{'GiB':>10}",
        *(
            f"  {name:26}{size / GIB:10.3f}"
            for name, size in memory.items()
            if name not in ("peak", "available")
        ),
        f"  {'peak':26}{peak / GIB:10.3f}",
        "  temporaries: activations, gradients, gathered parameters; results: what is not donated",
        "",
        f"{'collectives of one run':28}{'ops':>6}{'times':>8}{'GiB':>10}{'ms':>10}",
    ]
    for name, kind in report["collectives"]["kinds"].items():
        lines.append(
            f"  {name:26}{kind['operations']:6.0f}{kind['executions']:8.0f}"
            f"{kind['bytes'] / GIB:10.3f}{1e3 * kind['seconds']:10.2f}"
        )
    unknown = report["collectives"]["loops_of_unknown_length"]
    lines += [
        "  times: an operation in a loop's body counts once for each round"
        + (f"; {unknown} loops of unknown length count as one round" if unknown else ""),
        "  the longest:",
    ]
    for item in report["collectives"]["largest"]:
        shapes = item["shapes"][0] + (", ..." if len(item["shapes"]) > 1 else "")
        lines.append(
            f"    {1e3 * item['seconds']:8.2f} ms  {item['times']:4} x {item['kind']} of "
            f"{item['size'] / 2**20:.1f} MiB among {item['group']}: {shapes}"
        )
    lines += [
        "",
        f"model FLOPs of one run: {flops['model']:.4g} (remat adds {flops['recomputed']:.3g})",
        f"roofline: at least {1e3 * roofline['step']:.1f} ms, bound by {roofline['bound']}: "
        f"at most {roofline['tokens_per_second']:,.0f} tokens/s, "
        f"{100 * roofline['mfu_at_most']:.0f} % MFU",
        *(f"  {name:8}{1e3 * roofline[name]:10.2f} ms" for name in ("compute", "HBM", "links")),
        *(f"  {text}" for text in roofline["assumptions"]),
        "",
        f"{'parameters':34}{'shape':>24}{'per device':>22}   split over",
    ]
    for row in report["sharding"]:
        shape, part = _sizes(row["shape"]), _sizes(row["per_device"])
        spec = ", ".join(str(axis or "-") for axis in row["spec"])
        lines.append(f"  {row['name']:32}{shape:>24}{part:>22}   {spec}".rstrip())
    return "\n".join(lines)


def _verdict(fits: bool, needed: float, available: float) -> str:
    share = f"{needed / GIB:.2f} GiB of {available / GIB:.2f} GiB"
    if fits:
        return f"fits: {share} ({100 * needed / available:.0f} %)"
    return f"does not fit: {share}, {(needed - available) / GIB:.2f} GiB too much"


def out_of_memory_text(report: dict[str, Any]) -> str:
    """Format the short report of a program for which the compiler ran out of memory."""
    lines = [_verdict(False, report["memory"]["needed"], report["memory"]["available"])]
    lines += [
        f"  {name:26}{size / GIB:10.3f}"
        for name, size in report["memory"].items()
        if name not in ("needed", "available")
    ]
    return "\n".join(lines)


def _sizes(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _execution(model: Any) -> str:
    """Describe the chosen rematerialisation and layer scan, if the model has these options."""
    chosen = {field.name for field in dataclasses.fields(model)}
    remat = f"remat {model.remat}, " if "remat" in chosen else ""
    layers = f"{'scanned' if model.scan_layers else 'unrolled'} layers; "
    return remat + (layers if "scan_layers" in chosen else "")
