"""Whether two answers are equal as mathematics: numbers exactly, all else by math-verify."""

import contextlib
import json
import os
import re
import subprocess
import sys
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

    def has_value(self, gold: str) -> bool:
        """Whether an answer can be compared with others; arguments and errors as in `equal`."""
        return plain_number(gold) is not None or self._ask(in_box(gold), None) is not None

    def equal(self, gold: str, text: str) -> bool:
        r"""Whether a response gives an answer.

        Two plain numbers are compared exactly: the response's is that of its last `\boxed{...}`, or
        the whole response. All else is math-verify's to extract and to compare.

        Args:
            gold: Right answer, in LaTeX or as a number.
            text: Response.

        Raises:
            TimeoutError: Comparing took longer than the limit, or more memory than there is for it.
            ValueError: math-verify is not installed.
            RuntimeError: math-verify raised.
        """
        right, box = plain_number(gold), boxed(text)
        found = plain_number(text if box is None else box)
        if right is not None and found is not None:
            return right == found
        if "\\" in text and "\n" not in text.strip():  # LaTeX alone, as it stands in a box
            text = in_box(text.strip())
        return self._ask(in_box(gold), text) is True

    def close(self) -> None:
        """End the process, if there is one; the next comparison starts another."""
        with self._lock:
            self._end()

    def _ask(self, gold: str, text: str | None) -> bool | None:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._started()
            reply = self._exchange(json.dumps([gold, text]) + "\n")
            if reply is None:
                self._end()
                raise TimeoutError(f"comparing with {gold[:60]!r} took over {self._limit_s:g} s")
        if "error" in reply:
            raise RuntimeError(f"math-verify: {reply['error']}")
        return reply["equal"]

    def _started(self) -> "subprocess.Popen[str]":
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # -P: modules beside the worker hide none of the standard library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._limit_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, encoding="utf-8", errors="surrogatepass",
        )  # fmt: skip
        self._finalizer = weakref.finalize(self, _kill, self._process)
        reply = self._exchange("")
        if reply is None or "missing" in reply:
            self._end()
            if reply:
                raise ValueError(f"task math needs math-verify ({reply['missing']}): {INSTALL}")
            raise ValueError("the process of math-verify ended before it began: is memory left?")
        return self._process

    def _exchange(self, line: str) -> dict | None:
        """The reply to a line; None if the process is gone."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(reply) if reply.endswith("\n") else None

    def _end(self) -> None:
        self._process = None
        if self._finalizer is not None:
            self._finalizer()


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
