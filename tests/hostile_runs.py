"""Hostile cases through the command line: what one is, how it is run, what it owes a user."""

import dataclasses
import json
import os
import resource
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import QUICK, SERVER, Process


def words_of(text: str) -> tuple[str, ...]:
    """Words of a command line."""
    return tuple(shlex.split(text))


COMMAND = "from hostile_runs import command; command()"
LONGEST = 60.0  # seconds that a case may compute, on one processor, or wait
MOST_MEMORY = 1.0  # GiB that a case may take above what its process began with
ADDRESS_SPACE = 12 * 2**30  # above that of the process: what would take the machine is cut
PRELOADED = words_of(
    """train.pretrain train.sft train.rl.__main__ train.play train.rl.probe train.generate
    train.evaluate train.export train.compile train.benchmark train.tokenizer train.mixture
    train.grow train.merge train.list_runs train.rl.rejection train.demonstrations train.battery
    train.audit.lens train.audit.tuned_lens train.audit.train_sae train.audit.organisms
    train.audit.report train.experiments.quality train.experiments.synthesis pytest hostile_runs
    jax.experimental.multihost_utils"""
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile case.

    Attributes:
        name: Name of the case, unique.
        words: Words behind `thoughtbubbles`; `{base}` stands for the folder of what all cases share
            and `{here}` for that of the case.
        make: Makes the case's files, of its folder and the shared one.
        out: File or folder, relative to the case's folder, that must be absent after a refusal.
        environment: Variables of the process.
        legal: Whether it is no hostile case but the line that others change, which must succeed.
    """

    name: str
    words: tuple[str, ...]
    make: Callable[[Path, Path], object] | None = None
    out: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    legal: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a case came to.

    Attributes:
        case: The case.
        status: Exit status; None if it was killed, as one that hangs.
        text: What it printed.
        seconds: Wall-clock time.
        memory: Largest resident memory above that of the process at its start, in GiB.
        left: Whether its `out` is there.
    """

    case: Case
    status: int | None
    text: str
    seconds: float
    memory: float
    left: bool

    @property
    def refused(self) -> bool:
        """Whether the case ended with a status that says so."""
        return self.status in (1, 2)

    def fault(self) -> str:
        """What the command owes the user and did not keep, in one line; "" if nothing."""
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        if self.case.legal and self.status != 0:
            return f"a legal line ends with status {self.status}: {self.text[-300:]!r}"
        if self.status is None:
            return f"hangs: over {LONGEST:.0f} s of computing or waiting"
        if "Traceback (most recent call last)" in self.text:
            return f"traceback: {self.text.rstrip().splitlines()[-1][:200]}"
        if self.status not in (0, 1, 2):
            return f"exit status {self.status}: {self.text[-200:]!r}"
        if self.refused and len(errors) != 1:
            return f"{len(errors)} error lines and status {self.status}: {self.text[-300:]!r}"
        if self.refused and len(errors[0]) > 1000:
            return f"an error line of {len(errors[0])} characters: {errors[0][:200]}"
        if self.refused and "Traceback" in errors[0]:
            return f"a traceback in a line: {errors[0][:200]}"
        if self.refused and self.text.rstrip().splitlines()[-1] != errors[0]:
            return f"words behind the error line: {self.text[-300:]!r}"
        if self.status == 1 and not any(word in errors[0] for word in DOCUMENTED):
            return f"status 1 without a documented reason: {errors[0][:200]}"
        if self.status == 1 and "out of memory" in errors[0]:
            return f"memory is found missing only when it is: {errors[0][:200]}"
        if not self.refused and errors:
            return f"status 0 with an error line: {errors[0][:200]}"
        if self.memory > MOST_MEMORY:
            return f"takes {self.memory:.1f} GiB"
        if self.refused and self.left:
            return f"leaves {self.case.out} behind: {errors[0][:200]}"
        return ""


DOCUMENTED = ("out of memory", "not finite", "finite")


def command() -> None:
    """What the process of a case does: `thoughtbubbles` with its words, its memory in a file."""
    from train.cli.main import main

    now = _kilobytes("VmSize") * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, now + ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(os.environ["CASE"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    start, file = _kilobytes("VmRSS"), os.environ["MEMORY"]
    sys.argv = ["thoughtbubbles", *json.loads(os.environ["WORDS"])]
    try:
        main()
    finally:
        sys.stdout.flush()
        Path(file).write_text(str(_kilobytes("VmHWM") - start))


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def preload() -> None:
    """Let the processes of cases begin with everything imported; before any of them is started."""
    SERVER.set_forkserver_preload(list(PRELOADED))


def run_case(case: Case, base: Path, here: Path) -> Outcome:
    """Run a case in a folder of its own.

    Args:
        case: Case to run.
        base: Folder of what all cases share.
        here: Folder of the case, made if it is missing.
    """
    here.mkdir(parents=True, exist_ok=True)
    work = here / "work"
    work.mkdir()
    if case.make is not None:
        case.make(work, base)
    words = [word.replace("{base}", str(base)).replace("{here}", str(work)) for word in case.words]
    memory = here / "memory"
    environment = {
        **os.environ,
        "XLA_FLAGS": QUICK,
        "CASE": str(work),
        "MEMORY": str(memory),
        "WORDS": json.dumps(words),
        "XDG_CACHE_HOME": str(base / "cache"),
        **dict(case.environment),
    }
    began = time.monotonic()
    process = Process(["-c", COMMAND], environment, here / "output")
    status = end_of(process)
    taken = int(memory.read_text()) / 2**20 if memory.exists() else 0.0
    seconds = time.monotonic() - began
    left = bool(case.out) and os.path.lexists(work / case.out)
    return Outcome(case, status, process.output(), seconds, taken, left)


def end_of(process: Process, longest: float = LONGEST) -> int | None:
    """The exit status of a process, or None of one that hangs, which is killed.

    A busy machine lets a process wait for a processor, so that seconds by the clock say little: one
    hangs that has computed for too long, or has for as long computed less than a second.
    """
    computed, since = 0.0, time.monotonic()
    while True:
        try:
            return process.wait(min(1.0, longest))
        except TimeoutError:
            pass
        try:
            now = process.computed()
        except OSError:  # it has just ended
            continue
        if now > computed + 1:
            computed, since = now, time.monotonic()
        if now > longest or time.monotonic() - since > longest:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None


def shown(outcome: Outcome) -> str:
    """The command of a case as it is typed, cut."""
    words = shlex.join(
        word if len(word) < 120 else f"{word[:100]}..." for word in outcome.case.words
    )
    text = f"[{outcome.case.name}] thoughtbubbles {words}"
    return text.encode(errors="backslashreplace").decode()  # prompts that are no UTF-8


def report(outcomes: Sequence[Outcome]) -> str:
    """Counts, faults by kind, and the slowest cases."""
    faults = [(outcome, fault) for outcome in outcomes if (fault := outcome.fault())]
    kinds = Counter(fault.partition(":")[0] for _, fault in faults)
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:5]
    lines = [
        f"{len(outcomes)} cases: {sum(o.refused for o in outcomes)} refused, "
        f"{sum(o.status == 0 for o in outcomes)} done, {len(faults)} faults {dict(kinds)}",
        f"largest memory {max(o.memory for o in outcomes):.2f} GiB, "
        f"{sum(o.seconds for o in outcomes):.0f} s together",
        *(f"slow: {o.seconds:.1f} s {shown(o)}" for o in slowest),
        *(f"{fault}\n    {shown(outcome)}" for outcome, fault in faults),
    ]
    return "\n".join(lines)
