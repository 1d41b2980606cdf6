"""Runs of several real processes on simulated devices; ended at the latest with the test."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Compiling is most of the work of the tests; this takes a fifth of the time, where no cache is.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
PATIENCE = 600  # seconds; a busy machine needs many times what an idle one does


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """What was started, by its number, and what it has printed so far."""

    def __init__(self, commands: Sequence[Sequence[str]], environments, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"output-{free_port()}-{i}" for i in range(len(commands))]
        self.running = []
        for command, environment, output in zip(commands, environments, self._outputs, strict=True):
            with output.open("wb") as file:
                started = subprocess.Popen(
                    command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
                )
            self.running.append(started)

    def output(self, process: int) -> str:
        return self._outputs[process].read_text(errors="replace")

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
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        **(environment or {}),
    }
    started = Processes(
        [(sys.executable, *words, *(each or find_each_other)(i)) for i in range(count)],
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
