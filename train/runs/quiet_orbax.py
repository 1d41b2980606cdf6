"""Silence for what orbax prints when a save fails: the user gets one line of ours instead."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any


def hush_failed_saves() -> None:
    """Install filters, for good: threads of a failed save speak up after everything is closed."""
    logging.getLogger("absl").addFilter(_not_logged_by_orbax)
    logging.getLogger("asyncio").addFilter(_not_a_task_of_orbax)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


def hush_leftovers() -> None:
    """After a failed save: its coroutines that never started warn when they are collected."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _not_logged_by_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or "orbax" not in record.pathname


def _not_a_task_of_orbax(record: logging.LogRecord) -> bool:
    """Writes that nobody awaits any more name orbax's code or files in the message."""
    return "orbax" not in record.getMessage()


class _WithoutClosedLoops:
    """The hook before, but for writes that report to an event loop which the failure has closed."""

    def __init__(self, hook: Callable[[Any], Any]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)
