"""Process that compares answers with math-verify; requests and replies are lines of JSON.

The process imports nothing of this package. A comparison runs SymPy, which can use unbounded time
and memory in code that no exception interrupts. Therefore an unhandled timer signal ends the whole
process, and its parent starts a new process. Such a limit also works if the parent compares in a
thread, where math-verify's own limit cannot be used.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

_START_S = 120.0  # limit for importing SymPy
_MEMORY = 4 * 2**30


def main(limit_s: float) -> None:
    """Answer requests `[number, gold, text]` from stdin until stdin ends.

    The first reply is `{"request": 0}`, with the key `missing` if math-verify is not installed. A
    reply has the number of its request as `request`, and either `error` or `equal`: true or false
    for a comparison, null if `gold` cannot be parsed. If the text is null, `equal` is true if
    `gold` can be parsed.

    Args:
        limit_s: Maximum CPU time of a request in seconds. SIGPROF ends the process if a request
            exceeds this limit or the memory limit.
    """
    # The parent may ignore or block the signal, as profilers do, and a child inherits both.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.setitimer(signal.ITIMER_PROF, _START_S)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies, sys.stdout = sys.stdout, sys.stderr  # packages may print
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(json.dumps({"request": 0, "missing": str(error)}), file=replies, flush=True)
        return
    logging.disable()  # math-verify warns of the limit that it isn't given
    print(json.dumps({"request": 0}), file=replies, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # stderr is read only after a failed start
    signal.setitimer(signal.ITIMER_PROF, 0)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        number, gold, text = json.loads(line)
        reply = _reply(math_verify, gold, text)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"request": number, **reply}), file=replies, flush=True)


def _reply(math_verify: Any, gold: str, text: str | None) -> dict[str, Any]:
    try:
        value = math_verify.parse(gold, parsing_timeout=None)
        if not value or text is None:
            return {"equal": bool(value) or None}
        found = math_verify.parse(text, parsing_timeout=None)
        return {"equal": bool(math_verify.verify(value, found, timeout_seconds=None))}
    except MemoryError:
        signal.raise_signal(signal.SIGPROF)
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    main(float(sys.argv[1]))
