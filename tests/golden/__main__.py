"""The golden runs as a command; paths and environment are those of the tests."""

import importlib
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

sys.path[:0] = [str(TESTS.parent), str(TESTS)]
importlib.import_module("conftest")  # sets the environment before jax is imported
importlib.import_module("golden.runs").main()
