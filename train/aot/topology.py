"""Look up topologies by name: descriptions of unattached devices to compile programs for."""

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from train.devices.hardware import CHIPS, Chip, libtpu_without_tpus

HOST_GPUS = 8
# Slice shapes that are offered for each kind of TPU, and numbers of GPUs.
KNOWN = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "a100": ("1", "8", "16"),
    "h100": ("1", "8", "16"),
    "h200": ("1", "8", "16"),
}
# XLA's GpuTargetConfig in its text form: facts of the architecture (from CUDA's tuning guides) and
# of the card.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_per_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {l2}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""
_HOPPER = {
    "major": 9,
    "cores": 132,
    "lanes": 128,
    "clock": 1.98,
    "shared_per_core": 233472,
    "shared_per_block": 232448,
    "l2": 50 * 2**20,
}
_CARDS = {
    "a100": {
        "major": 8,
        "cores": 108,
        "lanes": 64,
        "clock": 1.41,
        "shared_per_core": 167936,
        "shared_per_block": 166912,
        "l2": 40 * 2**20,
    },
    "h100": _HOPPER,
    "h200": _HOPPER,
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Set of devices, which need not be attached, that a program is compiled for.

    Attributes:
        name: Name, e.g. "v5p:4x4x4".
        chip: Memory, FLOP/s and bandwidths of one device.
        devices: Descriptions of the devices, on which no array can be placed.
        platform: Platform to lower for, "tpu" or "cuda".
        options: Mapping from the names of compiler options to their values.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    platform: str
    options: dict[str, Any]


def topology_of(name: str) -> Topology:
    """Look up a topology by its name.

    Args:
        name: Name `CHIP:SIZE`, e.g. "v5e:4x4", or "h100:16" for two hosts of eight GPUs each.

    Raises:
        ValueError: The topology is unknown, or the compiler for it is not installed.
    """
    chip_name, _, size = name.partition(":")
    if chip_name not in KNOWN or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise _unknown(name)
    chip = CHIPS[chip_name]
    if chip_name in _CARDS:
        return _gpus(name, chip, size)
    if size.count("x") != KNOWN[chip_name][0].count("x"):
        raise _unknown(name)
    _require("libtpu", name, "tpu")
    libtpu_without_tpus()
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        if size not in KNOWN[chip_name]:
            raise _unknown(name) from None
        raise ValueError(f"topology {name!r}: libtpu says {str(error).splitlines()[0]}") from error
    return Topology(name, chip, described.devices, "tpu", {})


def _gpus(name: str, chip: Chip, size: str) -> Topology:
    count = int(size) if size.isdigit() else 0
    hosts, rest = divmod(count, HOST_GPUS)
    if not count or (hosts and rest):
        raise ValueError(
            f"topology {name!r}: choose up to {HOST_GPUS} GPUs, or a multiple of {HOST_GPUS}, "
            f"such as {chip.name}:16"
        )
    _require("jax_cuda12_plugin", name, "cuda")
    card = _GPU.format(
        **_CARDS[chip.name],
        bandwidth=round(chip.memory_bandwidth),
        memory=round(chip.memory),
        kind=chip.kinds[0],
    )
    shape = f"1x{hosts}x{HOST_GPUS}" if hosts else f"1x1x{count}"
    described = topologies.get_topology_desc(
        "", platform="cuda", target_config=card, topology=shape
    )
    # Autotuning needs a card to run kernels on.
    return Topology(name, chip, described.devices, "cuda", {"xla_gpu_autotune_level": 0})


def _require(module: str, name: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"topology {name!r} is compiled by {module}, which is not installed: "
            f'pip install -e ".[{extra}]"'
        )


def _unknown(name: str) -> ValueError:
    chip = name.partition(":")[0]
    chips = {chip: KNOWN[chip]} if chip in KNOWN else KNOWN
    known = ", ".join(f"{chip}:{size}" for chip, sizes in chips.items() for size in sizes)
    return ValueError(f"unknown topology {name!r}: choose one of {known}")


def link_bandwidth(chip: Chip, devices: Sequence[Any], group: Sequence[int]) -> float:
    """Return the bytes per second that each device of a group receives when all links are busy.

    A group of TPUs uses the links of every torus dimension that it spans. GPUs within a host use
    NVLink. A group of GPUs on several hosts uses the network cards of all its members on a host, up
    to NVLink's bandwidth.

    Args:
        chip: Chip whose bandwidths are used.
        devices: All devices of the mesh, in a flat list.
        group: Indices of the group's members in `devices`.
    """
    if chip.network is None:
        coordinates = [devices[index].coords for index in group]
        spanned = sum(len(set(along)) > 1 for along in zip(*coordinates, strict=True))
        return chip.link * max(spanned, 1)
    hosts = {devices[index].process_index for index in group}
    if len(hosts) == 1:
        return chip.link
    return min(chip.link, chip.network * len(group) / len(hosts))
