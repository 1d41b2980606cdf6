"""The console script `thoughtbubbles`: large arrays in huge pages, then the command."""

import contextlib
import os
import sys
from pathlib import Path

from train.cli.main import main

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start() -> None:
    """Run the command of `train.cli.main`, where it helps in a process that is begun anew.

    On a CPU, XLA allocates the temporaries of a program at each call, and the system gives them out
    in new pages of zeros: a third of the time of a small training step, if pages have 4 KiB. glibc
    asks for pages of 2 MiB only if the environment says so when a process begins. Nothing is done
    where the environment sets `GLIBC_TUNABLES`, or where the system gives huge pages to all or to
    nobody.
    """
    if _TUNABLES not in os.environ and _can_have_huge_pages():
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main()


def _can_have_huge_pages() -> bool:
    if sys.platform != "linux" or not sys.executable:
        return False
    with contextlib.suppress(OSError, ValueError):
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        known = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        return known and "[madvise]" in _HUGE_PAGES.read_text(encoding="utf-8")
    return False
