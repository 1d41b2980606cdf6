"""The golden runs give what they gave when their values were stored."""

import json
import math
from typing import Any

import pytest
from golden.runs import RUNS, VALUES

STORED = json.loads(VALUES.read_text())
# Cheap ones; the others with `python -m pytest -m experiment tests/test_golden.py`.
FEW = (
    "forward: window, burst",
    "decode: sampled",
)
# Steps of training amplify what machines round differently.
TOLERANCE = {
    "forward": 1e-5,
    "decode": 1e-5,
    "memory": 1e-4,
    "pretrain": 1e-3,
    "sft": 1e-3,
    "rl": 1e-3,
}


def assert_near(found: Any, stored: Any, tolerance: float, where: str) -> None:
    """The same structure, integers and texts; floats up to the tolerance, relative above 1."""
    if isinstance(stored, dict):
        assert found.keys() == stored.keys(), where
        for name, value in stored.items():
            assert_near(found[name], value, tolerance, f"{where}/{name}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for index, (mine, value) in enumerate(zip(found, stored, strict=True)):
            assert_near(mine, value, tolerance, f"{where}[{index}]")
    elif isinstance(stored, float) and not math.isnan(stored):
        assert abs(found - stored) <= tolerance * max(1.0, abs(stored)), (where, found, stored)
    else:
        both_nan = stored != stored and found != found
        assert found == stored or both_nan, (where, found, stored)


@pytest.mark.parametrize(
    "name",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.experiment) for name in RUNS],
)
def test_a_run_gives_what_it_gave(name: str):
    tolerance = TOLERANCE[name.partition(":")[0]] * (1000 if name == "forward: bfloat16" else 1)
    assert_near(json.loads(json.dumps(RUNS[name]())), STORED[name], tolerance, name)


def test_every_run_has_stored_values():
    assert STORED.keys() == RUNS.keys()
