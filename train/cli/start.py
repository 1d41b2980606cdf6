"""The console script `thoughtbubbles`: large arrays in huge pages, then the command."""

import contextlib
import os
import sys
from pathlib import Path

from train.cli.main import main

_TUNABLES, _BEGUN = "GLIBC_TUNABLES", "THOUGHTBUBBLES_BEGUN"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start() -> None:
    """Run the command of `train.cli.main`, where it helps in a process that is begun anew.

    On a CPU, XLA allocates the temporaries of a program at each call, and the system gives them out
    in new pages of zeros: a third of the time of a small training step, if pages have 4 KiB. glibc
    (2.35 or later) asks Linux for pages of 2 MiB only if the environment says so when a process
    begins; processes that it starts inherit that. Nothing is done where the environment sets
    `GLIBC_TUNABLES`, where the system gives huge pages to all or to nobody, or under a debugger,
    which would lose the process.
    """
    chosen = _TUNABLES in os.environ or _BEGUN in os.environ or sys.gettrace() is not None
    if not chosen and _can_have_huge_pages():
        # A process may lose variables of glibc, but not ours, so it begins anew only once.
        environment = {**os.environ, _TUNABLES: "glibc.malloc.hugetlb=1", _BEGUN: "1"}
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    main()


def _can_have_huge_pages() -> bool:
    if sys.platform != "linux" or not sys.executable:
        return False
    with contextlib.suppress(OSError, ValueError):
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        known = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        return known and "[madvise]" in _HUGE_PAGES.read_text(encoding="utf-8")
    return False
