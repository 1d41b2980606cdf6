"""Silence orbax's own messages about a failed save, for which users get one line instead."""

import logging
import sys
import threading
import warnings
from typing import Any


class QuietOrbax:
    """Context manager inside of which orbax prints nothing about a failed save.

    Several contexts may be open at once, and close in any order. The first context to open sets the
    process's hooks (filters of two loggers, `sys.unraisablehook`), and the last context to close
    restores the earlier hooks.
    """

    _lock = threading.Lock()
    _open = 0
    _hook: Any = None  # the process's hook before the first context

    def __init__(self) -> None:
        self._stays = False

    def __enter__(self) -> "QuietOrbax":
        cls = QuietOrbax
        with cls._lock:
            cls._open += 1
            if cls._open == 1:
                logging.getLogger("absl").addFilter(_not_logged_by_orbax)
                logging.getLogger("asyncio").addFilter(_not_a_task_of_orbax)
                cls._hook, sys.unraisablehook = sys.unraisablehook, _without_closed_loops
        return self

    def __exit__(self, *_: object) -> None:
        cls = QuietOrbax
        if self._stays:
            return
        with cls._lock:
            cls._open -= 1
            if cls._open == 0:
                logging.getLogger("absl").removeFilter(_not_logged_by_orbax)
                logging.getLogger("asyncio").removeFilter(_not_a_task_of_orbax)
                if sys.unraisablehook is _without_closed_loops:  # nobody has wrapped it since
                    sys.unraisablehook = cls._hook

    def stay(self) -> None:
        """Keep the hooks until the process ends, since a failed save prints even after the context.

        Threads of the failed save go on to log errors, and coroutines that never started cause
        warnings when they are garbage-collected.
        """
        self._stays = True
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _not_logged_by_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or "orbax" not in record.pathname


def _not_a_task_of_orbax(record: logging.LogRecord) -> bool:
    """Return False for an asyncio message about orbax, such as about an abandoned write."""
    return "orbax" not in record.getMessage()


def _without_closed_loops(unraisable: Any) -> None:
    """Call the earlier hook, except for errors that a failed save's closed event loop causes."""
    if str(unraisable.exc_value) != "Event loop is closed":
        QuietOrbax._hook(unraisable)
