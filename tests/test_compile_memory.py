"""Out of memory from end to end, by real compilers: what the command says would fit does."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from train.devices.hardware import GIB

# Parameters and moments of 24 GiB on each chip; few operations, so that it compiles soon.
LARGE = (
    *("tiny_plain", "--topology", "v5e:2x2", "--model.dtype", "bfloat16", "--attention", "xla"),
    *("--model.embed-dim", "512", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.mlp-dim", str(2**21), "--data.seq-len", "40", "--batch-size", "8"),
)


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train.compile", *LARGE, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


@pytest.mark.experiment
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install -e ".[tpu]"'
)
def test_what_is_said_to_fit_does(tmp_path: Path):
    """`python -m pytest -m experiment tests/test_compile_memory.py`, a minute or two.

    `test_compile.py` has the same logic with pretended sizes, and the compiler's own words.
    """
    path = tmp_path / "report.json"
    too_large = ask("--mesh", "data=4", "--json", str(path))
    assert too_large.returncode == 1, too_large.stderr
    said = re.search(r"does not fit: (.*) GiB of (.*) GiB, (.*) GiB too much", too_large.stdout)
    assert said
    needed, available, excess = map(float, said.groups())
    report = json.loads(path.read_text())
    state = (report["memory"]["parameters"] + report["memory"]["optimizer state"]) / GIB
    assert needed > state > available == 15.75
    assert excess == pytest.approx(needed - available, abs=0.011)
    # More remat can't help a state that is too large by itself: it is not even tried.
    assert re.findall("trying .*", too_large.stderr) == [
        "trying --mesh.data 1 --mesh.fsdp 4 --mesh.tensor 1"
    ]
    advice = report["advice"]
    assert f"fits with {advice['options']}: {advice['peak'] / GIB:.2f} GiB" in too_large.stdout
    direct = ask(*advice["options"].split())
    assert direct.returncode == 0, direct.stderr
    assert f"fits: {advice['peak'] / GIB:.2f} GiB of 15.75 GiB" in direct.stdout
