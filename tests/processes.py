"""Runs of several real processes on simulated devices; ended at the latest with the test.

Each is forked from one process that has imported what they need and started no backend: imports
take as long as all else that most of them do.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Compiling is most of the work of the tests; this takes a fifth of the time, where no cache is.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):  # later ones abort at the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
PATIENCE = 600  # seconds; a busy machine needs many times what an idle one does


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train.pretrain", "jax.experimental.multihost_utils"])


def run_words(words: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    """What `python words` does, in a process that was forked."""
    import jax  # not above: conftest imports this module before it sets what jax reads

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # jax has read its variables already.
    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_log_compiles", "JAX_LOG_COMPILES" in environment)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if words[0] in ("-m", "-c"):
        option, program, *arguments = words
    else:
        option, (program, *arguments) = "", words
    sys.argv = [program, *arguments]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif option == "-c":
        exec(program, {"__name__": "__main__"})
    else:
        runpy.run_path(program, run_name="__main__")


class Process:
    """One of them: as much of `subprocess.Popen` as tests use, and what it has printed so far."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._output = folder / f"output-{free_port()}"
        self._output.touch()
        arguments = (tuple(map(str, words)), dict(environment), str(self._output))
        self._process = SERVER.Process(target=run_words, args=arguments, daemon=True)
        self._process.start()

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None as long as the process lives."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"the process lives after {timeout} s")
        return self._process.exitcode

    def computed(self) -> float:
        """Seconds of the process on a processor so far."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


class Processes:
    """What was started, by its number, and what it has printed so far."""

    def __init__(self, commands: Sequence[Sequence[str]], environments, folder: Path):
        self.running = [
            Process(command, environment, folder)
            for command, environment in zip(commands, environments, strict=True)
        ]

    def output(self, process: int) -> str:
        return self.running[process].output()

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Until something has happened that does so before the first process ends."""
        deadline = time.monotonic() + PATIENCE
        while not true():
            ended = [i for i, process in enumerate(self.running) if process.poll() is not None]
            assert not ended and time.monotonic() < deadline, self.output((ended or [0])[0])
            time.sleep(0.01)

    def wait_for_words(self, process: int, words: str) -> None:
        """The last words of an aborted process come a moment after its end."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.output(process):
            assert time.monotonic() < deadline, self.output(process)
            time.sleep(0.01)

    def statuses(self) -> list[int]:
        """Once all have ended."""
        return [process.wait(timeout=PATIENCE) for process in self.running]


@contextlib.contextmanager
def processes(
    words: Sequence[str],
    folder: Path,
    *,
    count: int = 2,
    devices: int = 2,
    environment: dict[str, str] | None = None,
    each: Callable[[int], Sequence[str]] | None = None,
    environment_of_each: Callable[[int], dict[str, str]] | None = None,
    cache: Path | None = None,
) -> Iterator[Processes]:
    """Start `python words` with `devices` simulated devices `count` times.

    Args:
        folder: for their output.
        cache: of compiled programs; by default a new one in `folder`, since a killed process may
            leave half an entry there.
        each: words for process i; by default those by which the processes of a run find each other.
    """
    port = free_port()

    def find_each_other(process: int) -> Sequence[str]:
        return (
            *("--distributed.coordinator", f"127.0.0.1:{port}"),
            *("--distributed.num-processes", str(count), "--distributed.process-id", str(process)),
            *("--distributed.timeout", str(PATIENCE), "--distributed.heartbeat", "30"),
        )

    shared = os.environ | {
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache or folder / "jax"),
        **(environment or {}),
    }
    started = Processes(
        [(*words, *(each or find_each_other)(i)) for i in range(count)],
        [shared | (environment_of_each(i) if environment_of_each else {}) for i in range(count)],
        folder,
    )
    try:
        yield started
    finally:
        for process in started.running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
