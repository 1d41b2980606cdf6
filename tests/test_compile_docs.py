"""The stored compile reports are about the models, meshes and shardings that the code has now."""

import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from train.aot.config import CompileConfig, attention_of, presets
from train.aot.program import program_of
from train.aot.report import arguments_of, sharding_table
from train.aot.topology import topology_of
from train.cli.command import parse
from train.compile import as_options
from train.devices.hardware import GIB
from train.devices.mesh import make_mesh

REPORTS = sorted((Path(__file__).parent.parent / "docs" / "compile").glob("*.txt"))


def test_there_are_reports():
    assert len(REPORTS) == 6


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_report_is_of_what_would_be_compiled_now(path: Path):
    """All but what only a compiler knows; that shows as a difference when they are made again."""
    text = path.read_text()
    command, size = text.splitlines()[:2]
    preset, *options = as_options(shlex.split(command)[4:])
    config = parse(CompileConfig, options, presets()[preset])
    module = "libtpu" if "TPU" in text else "jax_cuda12_plugin"
    if find_spec(module) is None:
        pytest.skip(f"needs {module}")
    topology = topology_of(config.topology)
    mesh = make_mesh(config.mesh, topology.devices)
    program = program_of(config, mesh, config.what, attention_of(config, topology))
    assert size.startswith(f"{config.model.num_params():,} parameters, ")
    for name, bytes_ in arguments_of(program).items():
        assert f"  {name:26}{bytes_ / GIB:10.3f}\n" in text
    flops = f"model FLOPs of one run: {program.flops:.4g} (remat adds {program.recomputed:.3g})"
    assert flops in text
    table = text.partition("   split over\n")[2].splitlines()
    rows = sharding_table(program.arguments["parameters"])
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        shape, part = (" x ".join(map(str, row[key])) for key in ("shape", "per_device"))
        spec = ", ".join(str(axis or "-") for axis in row["spec"])
        assert " ".join(line.split()) == f"{row['name']} {shape} {part} {spec}".rstrip()
