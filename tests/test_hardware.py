"""Facts of chips: found by the kind that jax reports, and the same card never twice."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.aot.topology import KNOWN
from train.devices.hardware import CHIPS, GIB, chip_of


@pytest.mark.parametrize(
    ("kind", "name", "tflops", "memory", "bandwidth"),
    [
        ("TPU v4", "v4", 275, 32, 1200),
        ("TPU v5 lite", "v5e", 197, 16, 819),
        ("TPU v5", "v5p", 459, 96, 2765),
        ("TPU v6 lite", "v6e", 918, 32, 1638),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312, 40, 1555),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb", 312, 40, 1555),
        ("NVIDIA A100-SXM4-80GB", "a100", 312, 80, 2039),
        ("NVIDIA A100 80GB PCIe", "a100-pcie", 312, 80, 1935),
        ("NVIDIA H100 PCIe", "h100-pcie", 756, 80, 2000),
        ("NVIDIA H100 80GB HBM3", "h100", 989, 80, 3350),
    ],
)
def test_a_device_is_found_with_its_data_sheet(kind, name, tflops, memory, bandwidth):
    """Peak bfloat16 TFLOP/s without sparsity, GB of memory, GB/s."""
    chip = chip_of(kind)
    assert chip is CHIPS[name]
    assert (chip.flops, chip.memory_bandwidth) == (tflops * 1e12, bandwidth * 1e9)
    # What a program can have is a little less than what the card is sold with.
    assert 0.95 * memory * GIB < chip.memory <= memory * GIB


def test_other_devices_are_not_taken_for_one_of_the_table():
    for kind in ("cpu", "TPU v3", "TPU v4 lite", "NVIDIA H100", "NVIDIA A100"):
        assert chip_of(kind) is None


def test_no_kind_is_two_chips():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_what_is_compiled_for_is_known_whole():
    """Without a network a GPU would be taken for a TPU."""
    for name in KNOWN:
        is_tpu = any(kind.startswith("TPU") for kind in CHIPS[name].kinds)
        assert (CHIPS[name].network is None) == is_tpu


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu prints otherwise")
def test_a_command_on_a_machine_without_tpus_prints_only_its_own(tmp_path: Path):
    """As in a shell that sets no JAX_PLATFORMS: jax then loads libtpu and asks it for devices."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [sys.executable, "-m", "train.pretrain", "tiny", "--dry-run", "--out", str(tmp_path)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "1 cpu (data 1 x fsdp 1 x tensor 1)" in done.stdout
