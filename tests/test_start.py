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
    import jax, jax.numpy as jnp
    make = jax.jit(lambda x: jnp.broadcast_to(x, (2**10, 2**14)) + x)  # 64 MiB
    def new():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        make(1.0).block_until_ready()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    found = statistics.median(new() for _ in range(5))
    print(json.dumps([os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), found]))

start.main = main
start.start()
"""
HERE = start._can_have_huge_pages()


@pytest.mark.parametrize("chosen", [None, "glibc.malloc.hugetlb=0"])
def test_arrays_lie_in_huge_pages_unless_the_user_has_chosen(chosen):
    """64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB. The process keeps its number and words."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": chosen} if chosen else {}
    words = [sys.executable, "-X", "utf8", "-c", PROGRAM, "runs", "a b", ""]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, text=True) as process:
        output, _ = process.communicate()
    number, arguments, tunables, faults = json.loads(output)
    assert (number, arguments) == (process.pid, words[5:])
    if chosen or not HERE:
        assert tunables == chosen
    else:
        assert tunables == "glibc.malloc.hugetlb=1" and faults < 1000


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
    def fails(program, words):
        raise PermissionError(program)

    called = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(start, "_can_have_huge_pages", lambda: True)
    monkeypatch.setattr(os, "execv", fails)
    monkeypatch.setattr(start, "main", lambda: called.append(True))
    start.start()
    assert called
