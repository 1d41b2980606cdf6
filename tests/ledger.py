"""What the tests cost: seconds and compilations of each test file, printed at their end."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import pytest

COMPILED = "/jax/core/compile/backend_compile_duration"  # also when read from the cache
FOUND = "/jax/compilation_cache/cache_hits"
LONGEST = 10  # tests that are named


class Meter:
    """Counts the programs that this process compiles, and those that it reads from the cache."""

    def __init__(self) -> None:
        self.counts = collections.Counter[str]()
        jax.monitoring.register_event_duration_secs_listener(self._add)
        jax.monitoring.register_event_listener(self._add)
        self._before = self.counts.copy()

    def _add(self, event: str, *_: Any, **__: Any) -> None:
        if event in (COMPILED, FOUND):
            self.counts[event] += 1

    def since(self) -> tuple[int, int]:
        """Programs compiled and programs found since the last call."""
        new, self._before = self.counts - self._before, self.counts.copy()
        return new[COMPILED] - new[FOUND], new[FOUND]


class Ledger:
    """A plugin of pytest: workers measure, the process that prints adds up."""

    def __init__(self) -> None:
        self._meter = Meter()
        self.files = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
        self.tests = collections.Counter[str]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        report.programs = self._meter.since()  # xdist carries it over
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        compiled, found = getattr(report, "programs", (0, 0))  # none of a worker that crashed
        file = self.files[report.nodeid.partition("::")[0]]
        file.update(compiled=compiled, found=found, tests=report.when == "call")
        file["milliseconds"] += round(1000 * report.duration)
        self.tests[report.nodeid] += round(1000 * report.duration)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if len(self.tests) < 2:
            return
        write = terminalreporter.write_line
        terminalreporter.write_sep("-", "ledger: what each file costs")
        write("seconds  tests  compiled  from cache")
        total = collections.Counter[str]()
        ordered = sorted(self.files.items(), key=lambda item: -item[1]["milliseconds"])
        for name, file in ordered:
            total.update(file)
            write(_line(file) + name)
        write(_line(total) + "all (seconds of all workers)")
        longest = [(name, ms) for name, ms in self.tests.most_common(LONGEST) if ms >= 1000]
        for name, ms in longest:
            write(f"{ms / 1000:7.1f}  {name}")


def _line(file: collections.Counter[str]) -> str:
    seconds = file["milliseconds"] / 1000
    return f"{seconds:7.1f}{file['tests']:7}{file['compiled']:10}{file['found']:12}  "
