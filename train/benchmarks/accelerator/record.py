"""Record the measurements of a part in a JSON file, rewritten after each measurement."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles.fields import read_text
from train.runs.files import write_atomically


class TimeIsUp(Exception):
    """Raised if no time is left for the next measurement."""


class DeviceLost(Exception):
    """An error such as an illegal address has ended all work of this process on the device."""


def device_works() -> bool:
    """Whether the first device still computes: some errors of a GPU last as long as the process."""
    try:
        return float(jnp.zeros(()) + 1) == 1
    except Exception:
        return False


class Record:
    """Result file of a part, which runs the missing measurements and stores their results.

    Args:
        folder: Folder of the benchmark's results.
        part: Name of the part.
        seconds: Remaining time in seconds; no measurement begins once the time is over.
        device: Kind of the device that is measured; by default the kind of jax's first device.
        tiny: Whether the sizes that are measured are the tiny ones.

    Raises:
        ValueError: The part's file holds results of another device or of other sizes, or is
            damaged.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        seconds: float,
        device: str | None = None,
        tiny: bool = False,
    ):
        self.folder, self.part = folder, part
        self._path = folder / f"{part}.json"
        self._end = time.monotonic() + seconds
        device = device or jax.devices()[0].device_kind
        self.data: dict[str, Any] = read(folder, part, tiny) or {
            "part": part,
            "device": device,
            "jax": jax.__version__,
            "tiny": tiny,
            "finished": False,
            "measurements": {},
        }
        self.data |= {"finished": False, "tiny": tiny}
        if self.data["device"] != device:
            raise ValueError(
                f"{self._path} is of {self.data['device']}, this machine has {device}: "
                "choose another --out"
            )

    @property
    def measurements(self) -> dict[str, dict[str, Any]]:
        """Results by name, in the order in which they were measured."""
        return self.data["measurements"]

    @property
    def seconds_left(self) -> float:
        """Time that is left, in seconds; negative once it is over."""
        return self._end - time.monotonic()

    def measure(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a measurement, from the file or by measuring and writing it.

        Args:
            name: Name of the measurement.
            work: Function that measures and returns a JSON-serializable dict.

        Returns:
            Dict that `work` returned, with the "wall_seconds" of `work`. If `work` raised an
            exception, the dict has its type and first line as "error", and "out_of_memory", whether
            memory was too small. If the process has ended twice during this measurement, the dict
            has only "error".

        Raises:
            TimeIsUp: The time is over.
            DeviceLost: `work` raised an exception, and the device computes nothing any more. The
                result is written.
        """
        if name in self.measurements:
            return self.measurements[name]
        if self.seconds_left <= 0:
            raise TimeIsUp
        begun = self.data.setdefault("begun", {})
        begun[name] = begun.get(name, 0) + 1
        if begun[name] > 2:
            found = {"error": "the process ended twice, or was cut, in this measurement"}
            print(f"{self.part}: {name}: {found['error']}", file=sys.stderr, flush=True)
            self.put(name, found)
            return found
        self._save()
        started = time.perf_counter()
        try:
            found = work()
        except (TimeIsUp, KeyboardInterrupt):
            begun[name] -= 1
            self._save()
            raise
        except Exception as error:  # whatever a kernel or a compiler raises, the next one may run
            found = {"error": one_line(error), "out_of_memory": is_out_of_memory(error)}
            print(f"{self.part}: {name}: {found['error']}", file=sys.stderr, flush=True)
        found["wall_seconds"] = time.perf_counter() - started
        self.put(name, found)
        if "error" in found and not device_works():
            raise DeviceLost
        return found

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Store a result under a name, and write the file."""
        self.data.get("begun", {}).pop(name, None)
        self.measurements[name] = found
        self._save()

    def finish(self) -> None:
        """Mark the part as finished, and write the file."""
        self.data["finished"] = True
        self._save()

    def _save(self) -> None:
        text = json.dumps(without_nan(self.data), indent=1, allow_nan=False)
        write_atomically(self._path, text + "\n")


def without_nan(value: Any) -> Any:
    """Replace numbers that are not finite, such as a diverged loss, with None for JSON."""
    if isinstance(value, dict):
        return {name: without_nan(found) for name, found in value.items()}
    if isinstance(value, list):
        return [without_nan(found) for found in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(folder: Path, part: str, tiny: bool | None = None) -> dict[str, Any] | None:
    """Read a part's file; None if there is no such file.

    Args:
        folder: Folder of the benchmark's results.
        part: Name of the part.
        tiny: Whether the results must be of tiny sizes (True) or of full sizes (False); None reads
            both.

    Raises:
        ValueError: The file is damaged, for example after a loss of power, or of other sizes.
    """
    path = folder / f"{part}.json"
    if not path.exists():
        return None
    try:
        found = json.loads(read_text(path))
        whole = {"part", "device", "jax", "finished"} <= found.keys()
        if not whole or not all(type(each) is dict for each in found["measurements"].values()):
            raise ValueError("it holds no results")
    except (ValueError, RecursionError, AttributeError, KeyError) as error:
        what = "remove it, and its part is measured anew"
        raise ValueError(f"{path} is damaged ({error}): {what}") from error
    if tiny not in (None, found.get("tiny", False)):
        raise ValueError(f"{path} is of {'full' if tiny else 'tiny'} sizes: choose another --out")
    return found


def one_line(error: BaseException) -> str:
    """Return the type of an error, and at most 300 characters of its first line."""
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0][:300]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error's message, like XLA's, says that device memory was too small."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def seconds_per_call(call: Callable[[], Any], calls: int, rounds: int = 3) -> float:
    """Measure the mean seconds per call in each round, and return the smallest mean.

    A first call warms up. Calls are dispatched one after another and awaited once per round, so
    that the device stays busy.

    Args:
        call: Function that returns arrays.
        calls: Number of calls in a round.
        rounds: Number of rounds.
    """
    jax.block_until_ready(call())
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def seconds_in_a_loop(call: Callable[..., Any], inputs: tuple[Any, ...], calls: int) -> float:
    """Measure the mean seconds per call in three rounds, and return the smallest mean.

    Calls run one after another in a compiled loop. If the host dispatched short calls one by one,
    the dispatch would be measured instead. The compiler knows the number of iterations, because a
    GPU waits for the host before each iteration of a loop whose length is unknown.

    Args:
        call: Function of arrays.
        inputs: Arguments of `call`.
        calls: Number of calls in a loop. On accelerators, a round is as many dispatches of the loop
            as take 50 ms.
    """

    @jax.jit
    def run(*inputs: Any) -> Any:
        def again(_: Any, carry: Any) -> Any:
            # Behind the barrier, the inputs look new, so that no part of the call is moved out of
            # the loop. The results are carried, because the compiler removes work that no one uses.
            given = jax.lax.optimization_barrier(carry[0])
            return given, call(*given)

        shapes = jax.eval_shape(call, *inputs)
        results = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), shapes)
        return jax.lax.fori_loop(0, calls, again, (inputs, results))[1]

    def seconds(loops: int) -> float:
        started = time.perf_counter()
        for _ in range(loops):
            last = run(*inputs)
        jax.block_until_ready(last)
        return time.perf_counter() - started

    jax.block_until_ready(run(*inputs))
    loops = 1
    while jax.default_backend() != "cpu" and loops < 1 << 16 and seconds(loops) < 0.05:
        loops *= 2
    return min(seconds(loops) for _ in range(3)) / (loops * calls)
