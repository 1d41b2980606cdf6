"""Entry point of the console script `thoughtbubbles`, which enables huge pages for arrays."""

import contextlib
import os
import sys
from pathlib import Path

from train.cli.main import main

_TUNABLES, _BEGUN = "GLIBC_TUNABLES", "THOUGHTBUBBLES_BEGUN"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start() -> None:
    """Run `train.cli.main`, in a re-executed process with huge pages where these are faster.

    On a CPU, XLA allocates the temporaries of a program at each call, in new pages that Linux fills
    with zeros. With pages of 4 KiB, this takes a third of the time of a small training step.
    glibc (2.35 or later) requests pages of 2 MiB only if an environment variable is set when a
    process begins; child processes inherit the variable. The process is not re-executed if the
    environment sets `GLIBC_TUNABLES`, if Linux gives huge pages to all processes or to none, or
    under a debugger, which would lose the process.
    """
    chosen = _TUNABLES in os.environ or _BEGUN in os.environ or sys.gettrace() is not None
    if not chosen and _can_have_huge_pages():
        # glibc's variable may be lost, but not _BEGUN, so a process is re-executed only once.
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
