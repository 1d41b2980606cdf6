"""Check whether a model fits on devices: python -m train.compile PRESET --topology v5p:4x4x4.

The command compiles the train step (or a cached decode step) for devices that are not attached, and
reports the program's memory and sharding. The exit status is 0 if the program fits, 1 if the
program does not fit, and 2 if the command line has a mistake.
"""

import re
import shlex
import sys
from pathlib import Path

import jax

from train.aot import fitting
from train.aot.config import CompileConfig, check_config, presets
from train.aot.report import heading, out_of_memory_text, text_of
from train.aot.topology import topology_of
from train.cli.command import run_command
from train.cli.config_json import as_json
from train.devices.hardware import GIB
from train.devices.mesh import make_mesh
from train.evaluation.task_scores import check_output, write_results

JAX_SHARE = 0.75  # fraction of a GPU's memory that jax allocates by default


def main(config: CompileConfig) -> None:
    """Compile the program, print its report, and exit with status 0 if the program fits, else 1."""
    check_config(config)
    if config.json:
        check_output(Path(config.json))
    # The program is only compiled: an attached device should stay free.
    jax.config.update("jax_platforms", "cpu")
    # Cached programs can't be loaded without the device.
    jax.config.update("jax_enable_compilation_cache", False)
    topology = topology_of(config.topology)
    report = fitting.fit(config, topology)
    print(f"$ python -m train.compile {shlex.join(sys.argv[1:])}")
    print(heading(config, topology))
    print(text_of(report) if "roofline" in report else out_of_memory_text(report))
    usual = JAX_SHARE * topology.chip.memory
    if topology.platform == "cuda" and report["memory"]["peak"] > usual:
        print(
            f"jax takes {JAX_SHARE:.0%} of a card, {usual / GIB:.1f} GiB, unless "
            "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
        )
    if not report["fits"] and config.advise:
        report["advice"] = fitting.advice(config, topology, report)
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
        write_results(Path(config.json), report)
    sys.exit(0 if report["fits"] else 1)


def as_options(words: list[str]) -> list[str]:
    """Rewrite command-line shorthands as options that the parser knows.

    `--preset NAME` becomes the positional NAME, `--mesh data=1 fsdp=64` becomes
    `--mesh.data 1 --mesh.fsdp 64`.
    """
    words, given = list(words), []
    if "--preset" in words[:-1]:
        at = words.index("--preset")
        given = [words[at + 1]]
        del words[at : at + 2]
    if "--mesh" in words:
        start = end = words.index("--mesh") + 1
        while end < len(words) and re.fullmatch(r"(data|fsdp|tensor)=-?\d+", words[end]):
            end += 1
        sizes = [word.partition("=") for word in words[start:end]]
        if sizes:  # a bare --mesh is left for the parser to refuse
            words[start - 1 : end] = [w for name, _, n in sizes for w in (f"--mesh.{name}", n)]
    return given + words


def command() -> None:
    sys.argv[1:] = as_options(sys.argv[1:])
    run_command(main, CompileConfig, presets())


if __name__ == "__main__":
    command()
