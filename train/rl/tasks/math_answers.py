"""Mathematical comparison of answers: numbers exactly, everything else by math-verify."""

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
_PLAIN = re.compile(r"[-+\u2212]?[ \u00a0]?(?:[0-9.][0-9.,/ ]*[¼-¾⅐-⅞]?|[¼-¾⅐-⅞])")
_MARKED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")  # but not an escaped dollar sign
_WORKER = Path(__file__).with_name("math_worker.py")


class MathGrader:
    """Grader that compares responses with right answers, by math-verify in a separate process.

    The process starts when it is first needed. A comparison that exceeds `limit_s` ends the process
    and raises a `TimeoutError`; the next comparison starts a new process. The grader is
    thread-safe: a lock lets one thread at a time use the process.

    Args:
        limit_s: Maximum CPU time of a comparison in seconds. CPU time is limited, not wall-clock
            time, so that results do not depend on the load of the machine.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize | None = None
        self._requests = 0

    def start(self) -> None:
        """Start the process if it is not running.

        Raises:
            ValueError: The process can't start, or math-verify is not installed.
        """
        with self._lock:
            self._ensure()

    def has_value(self, gold: str) -> bool:
        """Return whether a right answer is a number or a text that math-verify can parse.

        Args:
            gold: Right answer, in LaTeX or as a number.

        Raises:
            TimeoutError, ValueError, RuntimeError: As in `equal`.
        """
        return plain_number(gold) is not None or self._ask(in_box(gold), None) is not None

    def equal(self, gold: str, text: str) -> bool:
        r"""Return whether a response gives the right answer.

        The answer of a response is its last `\boxed{...}`. Without a box it is the whole response
        if that is a plain number or a single line of bare LaTeX, or else what math-verify extracts.
        Two plain numbers are compared exactly; math-verify compares everything else.

        Args:
            gold: Right answer, in LaTeX or as a number.
            text: Response.

        Raises:
            TimeoutError: The comparison exceeded the limit of CPU time, or the memory limit.
            ValueError: The process can't start, or math-verify is not installed.
            RuntimeError: math-verify raised, or the process ended twice for another reason.
        """
        right, box = plain_number(gold), boxed(text)
        found = plain_number(text if box is None else box)
        if right is not None and found is not None:
            return right == found
        if box is not None:  # only one, as math-verify would combine neighbouring boxes
            text = f"\\boxed{{{box}}}"
        elif "\\" in text and "\n" not in text.strip():  # LaTeX alone, as it stands in a box
            text = in_box(text.strip())
        return self._ask(in_box(gold), text) is True

    def close(self) -> None:
        """End the process if it is running; the next comparison starts a new one."""
        with self._lock:
            self._end()

    def _ask(self, gold: str, text: str | None) -> bool | None:
        """Send a request and return the reply; retry once if the process ended unexpectedly."""
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
        """Send a request and read the reply; None if the process has ended."""
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
        """Read the reply to the last request; an interrupt ends the process, to drop the reply."""
        assert self._process is not None and self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
            reply = json.loads(line) if line.endswith("\n") else None
        except BaseException:
            self._end()
            raise
        return reply if reply is not None and reply["request"] == self._requests else None

    def _end(self) -> int | None:
        """End the process, and return its exit status; None if there is none."""
        process, self._process = self._process, None
        if process is None or self._finalizer is None:
            return None
        self._finalizer()
        return process.returncode


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # from a line that the process never read
        process.communicate()


def plain_number(text: str) -> Fraction | None:
    """Read a text that is only a number, such as 1,072.50, - 3/4, ½ or $5; None for others."""
    text = text.strip().strip("$").strip()
    return read_number(text) if _PLAIN.fullmatch(text) else None


def in_box(gold: str) -> str:
    r"""Put an answer without `$`, `\(`, `\[` or `\boxed` into a box, as math-verify expects."""
    return gold if _MARKED.search(gold) else f"\\boxed{{{gold}}}"
