"""Silence for what orbax prints when a save fails: the user gets one line of ours instead."""

import logging
import sys
import threading
import warnings
from typing import Any


class QuietOrbax:
    """Context manager: what orbax would print about a failed save is left out inside it.

    Several may be open at once, and end in any order. The hooks of the process (filters of two
    loggers, `sys.unraisablehook`) are set by the first and put back by the last one.
    """

    _lock = threading.Lock()
    _open = 0
    _hook: Any = None  # of the process, before ours

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
        """Keep silent until the process ends: threads of a failed save print after it is closed.

        Its coroutines that never started warn when they are collected.
        """
        self._stays = True
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _not_logged_by_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or "orbax" not in record.pathname


def _not_a_task_of_orbax(record: logging.LogRecord) -> bool:
    """Writes that nobody awaits any more name orbax's code or files in the message."""
    return "orbax" not in record.getMessage()


def _without_closed_loops(unraisable: Any) -> None:
    """The earlier hook, except for writes whose event loop the failure has closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        QuietOrbax._hook(unraisable)
