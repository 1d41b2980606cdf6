"""Connect the processes of a run, synchronise their values and errors, and end them together."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

# The one private name: its client is the only way to jax's coordination service.
from jax._src.distributed import global_state

from train.devices.failures import RunFailed

_FOREVER = 7 * 24 * 3600 * 1000  # ms; tokenising may be slow, and a dead process ends the wait
_LEAVING = 5_000  # ms that a process which has failed waits for others that fail as well


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run connect; by default there is one process.

    Attributes:
        coordinator: Address host:port of process 0, to which all processes connect; None for a
            single process, or with auto.
        num_processes: Number of processes of the run.
        process_id: Number of this process, from 0.
        auto: Whether jax detects coordinator, num_processes and process_id by itself, as it can in
            SLURM, Open MPI, Kubernetes and on Cloud TPU.
        timeout: Seconds to wait until all processes are connected at the start.
        heartbeat: Seconds without a heartbeat after which a process counts as dead.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    auto: bool = False
    timeout: int = 300
    heartbeat: int = 100

    def __post_init__(self):
        names = ("coordinator", "num_processes", "process_id")
        given = {name: getattr(self, name) for name in names}
        shown = " ".join(f"{name}={value}" for name, value in given.items())
        missing = [name for name, value in given.items() if value is None]
        if min(self.timeout, self.heartbeat) < 1:
            raise ValueError(
                f"timeout={self.timeout} heartbeat={self.heartbeat}: choose at least 1 second"
            )
        if self.auto and len(missing) < len(names):
            raise ValueError(f"auto finds what {shown} says: pass one or the other")
        if self.auto or len(missing) == len(names):
            return
        if missing:
            raise ValueError(f"{shown}: pass {' and '.join(missing)} too, or only auto")
        assert self.coordinator and self.num_processes is not None and self.process_id is not None
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"coordinator={self.coordinator} is not of the form host:port")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id={self.process_id} num_processes={self.num_processes}: "
                f"choose an id from 0 to num_processes - 1"
            )


@contextlib.contextmanager
def distributed_context(config: DistributedConfig) -> Iterator[None]:
    """Context manager that connects this process with the other processes of a run.

    With the default config the context does nothing. Enter it before the first use of a device. An
    exception in the block ends the process within seconds, because jax's own shutdown would wait
    for the other processes, which may be waiting for this one. A `ValueError`, `OSError` or
    `RunFailed` prints one line, any other `Exception` also its traceback; the exit status is 2 for
    a `ValueError` or `OSError` and 1 for any other `Exception`. A process that has waited
    `config.timeout` seconds for other processes at the start ends with one line and status 2.

    Args:
        config: Address of the coordinator and number of the processes.

    Raises:
        ValueError: Process 0 cannot be reached, or `auto` finds no cluster that jax knows.
    """
    if config.coordinator is None and not config.auto:
        yield
        return
    _join(config)
    name = f"process {global_state.process_id} of {global_state.num_processes}"
    _last_words.set(
        f"error: {name} was ended before the run was: by a kill, or by jax since another process "
        f"fell silent; start all of them again, and the run goes on from its last checkpoint"
    )
    try:
        yield
    except BaseException as error:
        _leave_if_alone(error)
        status = _report(error)
        with contextlib.suppress(Exception):
            _client().wait_at_barrier("thoughtbubbles/leaving", _LEAVING)
            jax.distributed.shutdown()  # all fail alike
        _last_words.withdraw()
        _exit(status)
    _last_words.withdraw()
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:  # what this process had to do is done
        print(f"note: another process ended early ({_first_line(error)})", file=sys.stderr)


def _join(config: DistributedConfig) -> None:
    # Where its own time runs out, jax aborts the process: ours runs out first.
    waiting = threading.Timer(config.timeout, _give_up, [config])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.timeout + 600,
            heartbeat_timeout_seconds=config.heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        address = global_state.coordinator_address
        if address is None:
            raise ValueError(
                "auto: this is no environment of several processes that jax knows (SLURM, Open "
                "MPI, Kubernetes, Cloud TPU): pass coordinator, num_processes and process_id"
            ) from error
        raise ValueError(
            f"process 0 cannot be reached at {address} ({_first_line(error)}): "
            "choose a port that is free on its host"
        ) from error
    finally:
        waiting.cancel()


def _give_up(config: DistributedConfig) -> None:
    address = global_state.coordinator_address
    if address is None:
        print(
            f"error: auto: the cluster has not said in {config.timeout} s who takes part: raise "
            "distributed.timeout, or pass coordinator, num_processes and process_id",
            file=sys.stderr,
        )
        _exit(2)
        return
    line = (
        f"not all of {global_state.num_processes} processes have come to {address} in "
        f"{config.timeout} s: start them all, or raise distributed.timeout"
    )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        line = (
            f"coordinator {address} has not answered in {config.timeout} s ({error}): start "
            "process 0 there, open the port, or raise distributed.timeout"
        )
    print(f"error: {line}", file=sys.stderr)
    _exit(2)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _report(error: BaseException) -> int:
    """Print why this process ends; returns its exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    expected = isinstance(error, (ValueError, OSError, RunFailed))
    if not expected or os.environ.get("THOUGHTBUBBLES_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {_first_line(error) if not expected else error}", file=sys.stderr)
    return 2 if isinstance(error, (ValueError, OSError)) else 1


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class _LastWords:
    """A line that is printed on stderr when this process ends, unless the line is withdrawn before.

    When other processes are lost, jax aborts this process in C++, after which no Python code runs.
    So a small watcher process waits at a pipe for the end of this process, and prints the line.
    """

    _WATCH = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
lines = sys.stdin.read().splitlines()
if any(lines[-1:]):
    print(lines[-1], file=sys.stderr)
"""

    _watcher: subprocess.Popen[str] | None = None

    def set(self, line: str) -> None:
        """Set the line, which replaces an earlier line."""
        if self._watcher is None:
            command = [sys.executable, "-I", "-S", "-c", self._WATCH]
            self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, encoding="utf-8")
        assert self._watcher.stdin
        self._watcher.stdin.write(f"{line}\n")
        self._watcher.stdin.flush()

    def withdraw(self) -> None:
        """Print nothing when this process ends."""
        if self._watcher is not None:
            self._watcher.communicate("\n")
            self._watcher = None


_last_words = _LastWords()


# Agreement

_rounds = itertools.count()  # equal in all processes, which call `allgather` in the same order


def is_multiprocess() -> bool:
    """Whether this run has more than one process."""
    return global_state.client is not None and global_state.num_processes > 1


def _client() -> Any:
    return global_state.client


def allgather(value: Any) -> list[Any]:
    """All-gather one value per process; every process must call this function.

    Args:
        value: JSON-serializable value of this process; NumPy numbers are converted to floats.

    Returns:
        Values of all processes in the order of the process numbers, as parsed from JSON.
    """
    client, number = _client(), next(_rounds)
    topic = f"thoughtbubbles/{number}"
    client.key_value_set(f"{topic}/{global_state.process_id}", json.dumps(value, default=float))
    client.wait_at_barrier(topic, _FOREVER)
    if number and global_state.process_id == 0:  # all processes here have read the last round
        client.key_value_delete(f"thoughtbubbles/{number - 1}/")
    values = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(topic)}
    return [json.loads(values[process]) for process in range(global_state.num_processes)]


def divide(owners: Sequence[int], work: Callable[[int], Any]) -> list[Any]:
    """Divide pieces of work among the processes, and return all results in every process.

    Every process must call this function, with the same pieces.

    Args:
        owners: Owner number of each piece; process `owner % number of processes` does the piece.
        work: Function from the index of a piece to its result. With several processes, results must
            be JSON-serializable.

    Returns:
        Results in the order of the pieces.

    Raises:
        ValueError: `work` raised a `ValueError` or an `OSError` in another process.
    """
    if not is_multiprocess():
        return [work(index) for index in range(len(owners))]
    if not owners:
        return []
    mine = [index for index, owner in enumerate(owners) if is_mine(owner)]
    with sync_errors():
        done = [(index, work(index)) for index in mine]
    found = {index: result for part in allgather(done) for index, result in part}
    return [found[index] for index in range(len(owners))]


def is_mine(owner: int) -> bool:
    """Whether this process does the pieces of work with this owner number (see `divide`)."""
    return not is_multiprocess() or owner % global_state.num_processes == global_state.process_id


@contextlib.contextmanager
def sync_errors() -> Iterator[None]:
    """Context manager that raises a `ValueError` or `OSError` of one process in all processes.

    Every process must enter the context. Processes without an error of their own raise a
    `ValueError` that names the process that failed.
    """
    if not is_multiprocess():
        yield
        return
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        own = error
    lines = allgather(own and _first_line(own))
    if own is not None:
        raise own
    for process, line in enumerate(lines):
        if line is not None:
            raise ValueError(f"process {process}: {line}")


def assert_same_on_all_hosts(name: str, value: Any) -> None:
    """Raise a ValueError in all processes unless all have the same value.

    Args:
        name: Name of the value, for the error message.
        value: JSON-serializable value of this process.
    """
    if not is_multiprocess():
        return
    first, *others = (_flat(name, other) for other in allgather(value))
    for process, other in enumerate(others, 1):
        differing = [key for key in first | other if first.get(key) != other.get(key)]
        if differing:
            key = differing[0]
            raise ValueError(
                f"processes disagree: {key} is {first.get(key)!r} in process 0 and "
                f"{other.get(key)!r} in process {process}: give all of them the same options, "
                "data and disk"
            )


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flat(f"{name}.{key}", part) for key, part in value.items()]
    return {key: part for flat in parts for key, part in flat.items()}


# Losing another process

# jax has no type and no status code for a peer that is gone: gloo's and NCCL's errors are UNKNOWN,
# INTERNAL or UNAVAILABLE, as are errors of one process alone, and dispatch turns some of them into
# a ValueError without a code ("UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/
# pair.cc:547] Connection closed by peer [127.0.0.1]:62101"). So their words decide.
# tests/test_distributed.py has the messages of jax 0.10.
_STATUS = re.compile(r"[A-Z_]{6,}: ")
_GONE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Socket closed|Gloo|NCCL|heartbeat|coordination"
    r"|[Bb]arrier (failed|timed out)",
)


@contextlib.contextmanager
def ends_when_alone() -> Iterator[None]:
    """Context manager that ends this process if an error shows that another process is lost.

    The process prints one line and exits with status 1. It ends inside the context, because
    clean-up outside of the context may wait for the lost process.
    """
    try:
        yield
    except Exception as error:
        _leave_if_alone(error)
        raise


def _leave_if_alone(error: BaseException) -> None:
    if is_multiprocess() and (reason := _loss(error)):
        # Not printed here: jax may be about to abort this process, with much to say.
        _last_words.set(
            f"error: process {global_state.process_id} of {global_state.num_processes}: another "
            f"process has ended or can't be reached ({reason}); see its output, start all of them "
            "again, and the run goes on from its last checkpoint"
        )
        _exit(1)


def _loss(error: BaseException | None) -> str | None:
    """Return the line of an error, or of an error that caused it, that shows a lost process."""
    while error is not None:
        line = _first_line(error)
        if _STATUS.match(line) and _GONE.search(str(error)):
            return line if len(line) <= 120 else line[:117] + "..."
        error = error.__cause__ or error.__context__
    return None
