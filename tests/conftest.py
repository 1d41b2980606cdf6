"""Settings that every test shares; the environment must be set before jax is first imported."""

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import QUICK

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thoughtbubbles/jax"

# In the environment, so that commands started by a test get the same.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".lstrip()
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
# Outside the tree, so that a fresh clone finds it warm; tests are mostly tiny compiles: cache all.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Lines of source in programs that nobody reads: a twelfth of all time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax  # noqa: E402 (reads the environment)
from contracts import OPTION as EXAMPLE  # noqa: E402
from contracts import take_examples  # noqa: E402
from ledger import Ledger  # noqa: E402

from train.cli.plugins import OPTION, load_plugins  # noqa: E402

# Tracing makes millions of small objects that live on: looking through them takes a tenth of all.
gc.set_threshold(50_000, 20, 50)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION,
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that adds to registries, so that tests hold its entries to contracts",
    )
    parser.addoption(
        EXAMPLE,
        action="append",
        default=[],
        metavar="CALL",
        help='how contracts make an entry whose options have no defaults, such as "mine(size=3)"',
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Ledger(), "ledger")
    names, texts = config.getoption(OPTION), config.getoption(EXAMPLE)
    if names or texts:
        try:
            load_plugins([OPTION, *names] if names else [])
            take_examples(texts)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run first, so that no worker waits for another at the end; else as they stand."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_sessionfinish() -> None:
    """Spare pytest, which collects five times at its end, all that the tests have left."""
    gc.freeze()


@pytest.fixture
def few_objects() -> Iterator[None]:
    """For a test that collects: looking through all that others have left takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


MAPS = Path("/proc/self/maps")
TESTS = itertools.count()


@pytest.fixture(autouse=True)
def room_for_compiled_programs() -> Iterator[None]:
    """Forget compiled programs before they fill the memory maps of a process.

    Each holds many; at 65,530, where Linux stops by default, XLA dies of a segmentation fault.
    """
    yield
    # Reading the maps takes long when there are many: each twentieth test does.
    if next(TESTS) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()
