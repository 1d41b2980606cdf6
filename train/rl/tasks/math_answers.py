"""Whether two answers are equal as mathematics: numbers exactly, all else by math-verify."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from fractions import Fraction
from pathlib import Path

from train.rl.tasks.numbers import read_number
from train.rl.tasks.truthful import boxed

INSTALL = 'pip install "thoughtbubbles[math]"'
_PLAIN = re.compile(r"[-+]?[0-9.][0-9.,/ ]*")
_MARKED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")  # but not a dollar of money
_WORKER = Path(__file__).with_name("math_worker.py")


class MathGrader:
    """Compares answers in a process of its own, which is started at the first comparison.

    Any thread may ask; one comparison is made at a time.

    Args:
        limit_s: Number of seconds of CPU time of a comparison, so that no busy machine decides.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize | None = None
        self._requests = 0

    def start(self) -> None:
        """Start the process, unless it runs.

        Raises:
            ValueError: The process can't start, or math-verify is not installed.
        """
        with self._lock:
            self._ensure()

    def has_value(self, gold: str) -> bool:
        """Whether an answer can be compared with others; arguments and errors as in `equal`."""
        return plain_number(gold) is not None or self._ask(in_box(gold), None) is not None

    def equal(self, gold: str, text: str) -> bool:
        r"""Whether a response gives an answer: by its last `\boxed{...}`, if it has one.

        Two plain numbers are compared exactly. All else is math-verify's to compare, and to extract
        from a response without a box.

        Args:
            gold: Right answer, in LaTeX or as a number.
            text: Response.

        Raises:
            TimeoutError: Comparing took longer than the limit, or more memory than there is for it.
            ValueError: The process can't start, or math-verify is not installed.
            RuntimeError: math-verify raised, or its process ended twice for another reason.
        """
        right, box = plain_number(gold), boxed(text)
        found = plain_number(text if box is None else box)
        if right is not None and found is not None:
            return right == found
        if box is not None:  # math-verify would take boxes that stand near each other together
            text = f"\\boxed{{{box}}}"
        elif "\\" in text and "\n" not in text.strip():  # LaTeX alone, as it stands in a box
            text = in_box(text.strip())
        return self._ask(in_box(gold), text) is True

    def close(self) -> None:
        """End the process, if there is one; the next comparison starts another."""
        with self._lock:
            self._end()

    def _ask(self, gold: str, text: str | None) -> bool | None:
        """The reply of the process; one that something else has ended is asked once more."""
        code = None
        for _ in range(2):
            with self._lock:
                self._ensure()
                reply = self._exchange(gold, text)
                if reply is None:
                    code = self._end()
            if reply is None and code == -signal.SIGPROF:
                raise TimeoutError(
                    f"comparing with {gold[:60]!r} took over {self._limit_s:g} s, or all memory"
                )
            if reply is not None and "error" in reply:
                raise RuntimeError(f"math-verify: {reply['error']}")
            if reply is not None:
                return reply["equal"]
        raise RuntimeError(f"math-verify: its process ended twice, the second time by {code}")

    def _ensure(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._start()

    def _start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with tempfile.TemporaryFile() as errors:
            try:
                # -P: modules beside the worker hide none of the standard library. In a session of
                # its own, Ctrl-C at a terminal reaches the run alone.
                process = self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_WORKER), str(self._limit_s)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                    env=environment, encoding="utf-8", errors="surrogatepass",
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise ValueError(f"the process of math-verify can't start: {error}") from None
            self._finalizer = weakref.finalize(self, _kill, process)
            self._requests = 0
            reply = self._read()
            if reply is not None and "missing" not in reply:
                return
            code = self._end()
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        if reply is not None:
            raise ValueError(f"task math needs math-verify ({reply['missing']}): {INSTALL}")
        raise ValueError(
            f"the process of math-verify ended before it began, status {code} "
            f"({last[:200] or 'it says not why'}): is memory left?"
        )

    def _exchange(self, gold: str, text: str | None) -> dict | None:
        """The reply to a request; None if the process is gone."""
        assert self._process is not None and self._process.stdin is not None
        self._requests += 1
        try:
            self._process.stdin.write(json.dumps([self._requests, gold, text]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        except BaseException:
            self._end()
            raise
        return self._read()

    def _read(self) -> dict | None:
        """The reply to the last request; an interrupt ends the process, whose reply is unread."""
        assert self._process is not None and self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
            reply = json.loads(line) if line.endswith("\n") else None
        except BaseException:
            self._end()
            raise
        return reply if reply is not None and reply["request"] == self._requests else None

    def _end(self) -> int | None:
        """End the process; its status."""
        process, self._process = self._process, None
        if process is None or self._finalizer is None:
            return None
        self._finalizer()
        return process.returncode


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # of a line that it never read
        process.communicate()


def plain_number(text: str) -> Fraction | None:
    """Value of a text that is a number and nothing else, as 1,072.50 or 3/4; None for others."""
    text = text.strip().strip("$").strip()
    return read_number(text) if _PLAIN.fullmatch(text) else None


def in_box(gold: str) -> str:
    """An answer as math-verify takes it: LaTeX stands between signs that say so."""
    return gold if _MARKED.search(gold) else f"\\boxed{{{gold}}}"
