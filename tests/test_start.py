"""The console script: a process begun anew, whose large arrays lie in huge pages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from train.cli import start

PROGRAM = """
import json, os, resource, statistics, sys
from train.cli import start

def main():
    print(json.dumps([os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES")]))
    if "--faults" not in sys.argv:
        return
    import jax, jax.numpy as jnp
    make = jax.jit(lambda x: jnp.broadcast_to(x, (2**10, 2**14)) + x)  # 64 MiB
    def new():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        make(1.0).block_until_ready()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(statistics.median(new() for _ in range(5)))

start.main = main
start.start()
"""
HERE = start._can_have_huge_pages()
VARIABLES = "GLIBC_TUNABLES", "THOUGHTBUBBLES_BEGUN"


def started(words, **environment):
    """What the program prints, and the number of its process."""
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-X", "utf8", "-c", PROGRAM, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=own | environment, stdout=pipe, text=True
    ) as process:
        output, _ = process.communicate()
    return output.splitlines(), process.pid


@pytest.mark.parametrize(
    "environment", [{}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {"THOUGHTBUBBLES_BEGUN": "1"}]
)
def test_a_process_begins_anew_once_unless_the_user_has_chosen(environment):
    """It keeps its number and its words."""
    words = ["runs", "a b", ""]
    [line], process = started(words, **environment)
    number, arguments, tunables = json.loads(line)
    assert (number, arguments) == (process, words)
    anew = HERE and not environment
    assert tunables == ("glibc.malloc.hugetlb=1" if anew else environment.get("GLIBC_TUNABLES"))


@pytest.mark.experiment  # the kernel may have no huge pages left
@pytest.mark.skipif(not HERE, reason="no huge pages on request")
def test_arrays_lie_in_huge_pages():
    """64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB."""
    assert float(started(["--faults"])[0][1]) < 1000
    assert float(started(["--faults"], THOUGHTBUBBLES_BEGUN="1")[0][1]) > 16_000


@pytest.mark.parametrize(
    ("platform", "libc", "pages", "expected"),
    [
        ("linux", "glibc 2.35", "always [madvise] never", True),
        ("linux", "glibc 2.34", "always [madvise] never", False),
        ("linux", "glibc 2.36", "[always] madvise never", False),
        ("linux", "glibc 2.36", "always madvise [never]", False),
        ("linux", "glibc 2.36", None, False),
        ("linux", None, "always [madvise] never", False),
        ("darwin", "glibc 2.36", "always [madvise] never", False),
    ],
)
def test_where_huge_pages_can_be_had(
    platform, libc, pages, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if pages:
        (tmp_path / "enabled").write_text(f"{pages}\n", encoding="utf-8")
    monkeypatch.setattr(start, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "confstr", lambda name: libc)
    assert start._can_have_huge_pages() == expected


def test_a_process_that_cannot_begin_anew_goes_on(monkeypatch: pytest.MonkeyPatch):
    def fails(program, words, environment):
        called.append(environment["GLIBC_TUNABLES"])
        raise PermissionError(program)

    called = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(start, "_can_have_huge_pages", lambda: True)
    monkeypatch.setattr(os, "execve", fails)
    monkeypatch.setattr(start, "main", lambda: called.append("main"))
    start.start()
    assert called == ["glibc.malloc.hugetlb=1", "main"]
    assert "GLIBC_TUNABLES" not in os.environ
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    start.start()
    assert called[2:] == ["main"], "a debugger keeps its process"
