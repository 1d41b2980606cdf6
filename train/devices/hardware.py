"""Published specifications of chips, for roofline times, memory limits and MFU."""

import dataclasses
import os
from pathlib import Path

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it (a device).

    Attributes:
        name: Name of the chip in topologies, such as `v5p` in `v5p:4x4x4`.
        kinds: `device_kind` strings of `jax.devices()`.
        flops: Peak bfloat16 matrix FLOP/s, dense, with float32 accumulation.
        memory: Memory that a program can use, in bytes.
        memory_bandwidth: Bandwidth of this memory, in bytes/s.
        link: Bandwidth at which a device sends, in bytes/s: on a TPU along one dimension of its
            torus (two links, one in each direction), on a GPU to the other devices of its host.
        network: Bandwidth at which each device sends to other hosts, in bytes/s. None for TPUs,
            whose links connect hosts too, and for GPUs that are not part of a known multi-host
            system, for which no topology can be given.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float | None = None


# TPU: Google Cloud's page of each version gives peak, HBM bandwidth, and "bidirectional ICI
# bandwidth per chip" (600, 400, 1200, 800, 1200 GB/s; v4's as six links of 50 GB/s each way), of
# which one way is half and a dimension of the torus has 1/3, 1/2, 1/3, 1/2, 1/3. Memory is what
# libtpu's compiler says is available (0.0.42; v4: as one device of two cores, as jax runs it); a
# tpu7x chip is two devices, each with half of all.
# GPU: NVIDIA's data sheets (NVLink one way: half of the total; for PCIe cards PCIe itself, since
# their NVLink bridges join only pairs) and those of the DGX systems (one network card of 200 or
# 400 Gb/s for each GPU; PCIe cards have no such system). Memory is the total that CUDA reports.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1200e9, 100e9),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 100e9),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 200e9),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1638e9, 200e9),
        Chip("tpu7x", ("TPU7x",), 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 100e9),
        Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 79.1 * GIB, 2039e9, 300e9, 25e9),
        Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, 39.49 * GIB, 1555e9, 300e9, 25e9),
        Chip("a100-pcie", ("NVIDIA A100 80GB PCIe",), 312e12, 79.1 * GIB, 1935e9, 32e9),
        Chip("a100-pcie-40gb", ("NVIDIA A100-PCIE-40GB",), 312e12, 39.49 * GIB, 1555e9, 32e9),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 79.1 * GIB, 3350e9, 450e9, 50e9),
        Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 79.1 * GIB, 2000e9, 64e9),
        Chip("h200", ("NVIDIA H200",), 989e12, 139.8 * GIB, 4800e9, 450e9, 50e9),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """Find the chip of a `jax.Device.device_kind`; None if `CHIPS` lacks the chip."""
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip
    return None


# Without these libtpu queries the metadata server of a machine without TPUs, and prints that it
# does not answer; without the first, two processes cannot compile for TPUs at once.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def libtpu_without_tpus() -> None:
    """Set environment variables so that libtpu compiles for TPUs on a machine without TPUs.

    Variables that are already set keep their values.
    """
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)


def quiet_libtpu() -> None:
    """Keep libtpu silent on a machine without TPUs.

    Call this function before JAX lists its devices, because JAX then loads libtpu.
    """
    if not (any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))):
        libtpu_without_tpus()
