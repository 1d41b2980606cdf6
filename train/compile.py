"""Will it fit, and how is it split? python -m train.compile PRESET --topology v5p:4x4x4.

Compiles the train step (or a cached decode step) for devices that aren't there. Exit status 0: it
fits, 1: it does not, 2: a mistake.
"""

import dataclasses
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from train.aot.program import Program, What, program_of
from train.aot.report import arguments_of, out_of_memory_text, report_of, text_of
from train.aot.topology import KNOWN, Topology, topology_of
from train.cli.command import run_command
from train.cli.config_json import as_json
from train.devices.attention import Attention, resolve
from train.devices.hardware import GIB
from train.devices.mesh import MeshConfig, make_mesh
from train.pretraining.config import RunConfig
from train.pretraining.presets import PRESETS

# Options of a run that would mean something else here than they say.
IDLE = ("dry_run", "profile", "peak_tflops", "distributed", "init", "train")
JAX_SHARE = 0.75  # of a GPU's memory, by default
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompileConfig(RunConfig):
    """A pretraining run, and what to compile it for.

    Attributes:
        topology: Chips to compile for, e.g. v5e:2x4, v5p:4x4x4, v6e:4x4, h100:16.
        what: Program to compile: the train "step", or a cached "decode" step of `batch_size` rows
            with room for `data.seq_len` tokens.
        advise: Whether to compile what might fit where the config does not, and to say what does.
        json: File for the report as data; none by default.
    """

    topology: str = ""
    what: What = "step"
    advise: bool = True
    json: str | None = None


def main(config: CompileConfig) -> None:
    """Compile, print the report, and leave with the status that answers the question."""
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    for name in IDLE:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{name}={getattr(config, name)}: nothing is run here, leave it out")
    if not config.topology:
        examples = ", ".join(f"{chip}:{sizes[-1]}" for chip, sizes in KNOWN.items())
        raise ValueError(f"compile for what? pass --topology, e.g. one of {examples}")
    # Nothing runs here, and a device that is here should stay free.
    jax.config.update("jax_platforms", "cpu")
    # Its entries can't be read back without the device.
    jax.config.update("jax_enable_compilation_cache", False)
    topology = topology_of(config.topology)
    report = fit(config, topology)
    print(heading(config, topology))
    print(text_of(report) if "roofline" in report else out_of_memory_text(report))
    usual = JAX_SHARE * topology.chip.memory
    if topology.platform == "cuda" and report["memory"]["peak"] > usual:
        print(
            f"jax takes {JAX_SHARE:.0%} of a card, {usual / GIB:.1f} GiB, unless "
            "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
        )
    if not report["fits"] and config.advise:
        report["advice"] = advice(config, topology, report)
        if report["advice"] is None:
            print("nothing tried fits: take more devices, or a smaller batch or model")
        else:
            change, peak = report["advice"]["options"], report["advice"]["peak"]
            print(f"fits with {change}: {peak / GIB:.2f} GiB")
    report["run"] = {
        "topology": topology.name,
        "what": config.what,
        "mesh": dict(make_mesh(config.mesh, topology.devices).shape),
        "config": as_json(config),
        "jax": jax.__version__,
    }
    if config.json:
        Path(config.json).write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(0 if report["fits"] else 1)


def fit(config: CompileConfig, topology: Topology) -> dict[str, Any]:
    """The report of a config on a topology; where the compiler runs out of memory, a short one.

    Raises:
        ValueError: the config can't be placed on this topology, or does not compile.
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


def attention_of(config: CompileConfig, topology: Topology) -> Attention:
    """As in training, but for GPUs: jax can't see from here what a card's cuDNN would run."""
    if config.attention == "auto" and topology.platform == "cuda":
        return "xla"
    return config.attention


def needed_memory(message: str) -> int | None:
    """Bytes of HBM that a program needs, from libtpu's message; None if it says something else."""
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
    """The first change that fits, as options: what slows a run least comes first.

    Args:
        report: of the config as it is, which does not fit.
    """
    state = sum(arguments_of(_program(config, topology)).values())
    excess = {config.model.remat: _excess(report)}
    for change, changed in remedies(config, len(topology.devices)):
        try:
            part = sum(arguments_of(_program(changed, topology)).values())
        except ValueError:
            continue  # does not divide
        if part > topology.chip.memory:
            continue
        # Splitting the state further saves what of it, and of gradients, is elsewhere then.
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
    """Changes that need less memory, as options and as configs, the least costly first.

    Computing activations again; splitting the state over all devices; smaller parts of the batch;
    splitting the matrices too.
    """
    sizes = [size for size in dataclasses.asdict(config.mesh).values() if size != -1]
    rest = devices // max(math.prod(sizes), 1)
    data, fsdp, tensor = (rest if size == -1 else size for size in dataclasses.astuple(config.mesh))
    step = config.what == "step"
    policies = ("none", "dots", "full")
    stricter = policies[policies.index(config.model.remat) + 1 :] if step else ()
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


def heading(config: CompileConfig, topology: Topology) -> str:
    """What was compiled, and the command that compiles it again."""
    model, mesh = config.model, make_mesh(config.mesh, topology.devices)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    forks = model.summary()
    if config.what == "step":
        work = (
            f"train step of {config.batch_size} rows of {config.data.seq_len} tokens "
            f"(accumulate {config.accumulate}), remat {model.remat}, "
            f"{'scanned' if model.scan_layers else 'unrolled'} layers; attention "
            f"{resolve(model, mesh, attention_of(config, topology))}"
        )
    else:
        work = f"decode step of {config.batch_size} rows with room for {config.data.seq_len} tokens"
    return (
        f"$ python -m train.compile {shlex.join(sys.argv[1:])}\n"
        f"{model.num_params():,} parameters, {forks}, {model.dtype}\n"
        f"{work}\n"
        f"{topology.name}: {mesh.size} x {topology.devices[0].device_kind} ({sizes}); "
        f"jax {jax.__version__}"
    )


def as_options(words: list[str]) -> list[str]:
    """Also understand `--preset NAME` and `--mesh data=1 fsdp=64`."""
    words, given = list(words), []
    if "--preset" in words[:-1]:
        place = words.index("--preset")
        given = [words[place + 1]]
        del words[place : place + 2]
    if "--mesh" in words:
        place = end = words.index("--mesh") + 1
        while end < len(words) and re.fullmatch(r"(data|fsdp|tensor)=-?\d+", words[end]):
            end += 1
        sizes = [word.partition("=") for word in words[place:end]]
        if sizes:  # a bare --mesh is left for the parser to refuse
            words[place - 1 : end] = [w for name, _, n in sizes for w in (f"--mesh.{name}", n)]
    return given + words


def presets() -> dict[str, CompileConfig]:
    """The runs of `train.pretraining.presets`, for no topology yet."""
    return {
        name: CompileConfig(
            **{field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
        )
        for name, run in PRESETS.items()
    }


def command() -> None:
    sys.argv[1:] = as_options(sys.argv[1:])
    run_command(main, CompileConfig, presets())


if __name__ == "__main__":
    command()
