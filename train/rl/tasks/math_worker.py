"""Process that compares answers with math-verify, a line of JSON in and out for each.

It imports nothing of this package. Comparing runs SymPy, which can take for ever and all memory, in
code that no exception reaches: an alarm that nobody handles ends the process, and what started it
starts another one. So the limit holds in threads, where math-verify's own can't be used.
"""

import json
import logging
import resource
import signal
import sys
from typing import Any

_START_S = 120.0  # of importing SymPy
_MEMORY = 4 * 2**30


def main(limit_s: float) -> None:
    """Answer requests `[gold, text]` until the input ends; a `null` for a gold that has no value.

    Args:
        limit_s: Number of seconds of CPU time of a request, after which SIGPROF ends the process.
    """
    signal.setitimer(signal.ITIMER_PROF, _START_S)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies, sys.stdout = sys.stdout, sys.stderr  # packages may print
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=replies, flush=True)
        return
    logging.disable()  # math-verify warns of the limit that it isn't given
    print(json.dumps({"equal": True}), file=replies, flush=True)
    signal.setitimer(signal.ITIMER_PROF, 0)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        reply = _reply(math_verify, *json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _reply(math_verify: Any, gold: str, text: str | None) -> dict[str, Any]:
    try:
        value = math_verify.parse(gold, parsing_timeout=None)
        if not value or text is None:
            return {"equal": bool(value) or None}
        found = math_verify.parse(text, parsing_timeout=None)
        return {"equal": bool(math_verify.verify(value, found, timeout_seconds=None))}
    except (Exception, RecursionError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    main(float(sys.argv[1]))
