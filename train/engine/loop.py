"""The training loop of all jobs, and the protocol that a job implements for it."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from train.cli.config_json import as_json
from train.data import Batch, TrainReader
from train.devices.distributed import (
    assert_same_on_all_hosts,
    ends_when_alone,
    is_multiprocess,
    sync_errors,
)
from train.devices.failures import RunFailed
from train.devices.mesh import place_local, rows_here
from train.engine.config import LoopConfig
from train.engine.state import Trainable, TrainState, resolved
from train.engine.step import TrainStep
from train.runs.checkpoint import Checkpointer
from train.runs.files import write_atomically
from train.runs.instruments import Profiler, Stopwatch, memory, not_recorded, peak_flops
from train.runs.metadata import load_run_meta
from train.runs.metrics import MetricWriter, Progress
from train.runs.resume import noted_changes
from train.runs.run_folder import (
    check_base,
    check_continuation,
    check_data,
    run_lock,
    save_evidence,
)


class NonFiniteLoss(RunFailed):
    """The loss or a gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was dispatched to the devices, and whose metrics the host has not read yet."""

    step: int  # number of updates after this step
    batch: Batch
    metrics: dict[str, Any]


class TrainingJob(Protocol):
    """Model, data and evaluation of a run: the protocol that the training loop calls.

    Attributes:
        config: Config of the run, in which fields that depend on pretrained weights are set.
        trainable: Static side of the run's state, without any arrays.
        seq_len: Number of targets in a row.
        step_flops: Number of model FLOPs of a step.
        keeps_frozen: Whether checkpoints also hold the frozen parameters. If not, a resumed run
            takes the frozen parameters from `first_state`.
        meta: JSON-serializable metadata that is added to the metadata of each checkpoint.
    """

    config: Any
    trainable: Trainable
    seq_len: int
    step_flops: int
    keeps_frozen: bool

    @property
    def meta(self) -> dict[str, Any]: ...

    def prepare(self) -> Any:
        """Prepare the data of the run.

        Returns:
            Object with attributes `train` and `validation` (rows of the two splits), `tokenizer`,
            `fingerprint` (hash of the data, a string) and `summary` (description for the user).
        """
        ...

    def reader(self, data: Any, local_rows: np.ndarray) -> TrainReader:
        """Return a reader of batches of the training rows.

        Args:
            data: Data that `prepare` returned.
            local_rows: Indices of the rows of a batch that this process reads (`rows_here`).
        """
        ...

    def inputs(self, batch: Batch) -> Any:
        """Select the arrays of b local rows that the train step reads, a tree of `[b, ...]`."""
        ...

    def train_step(self) -> TrainStep: ...

    def observe(self, sums: Mapping[str, Any]) -> None:
        """Receive the sums that the loss returned; called after every step, logged or not."""
        ...

    def step_metrics(
        self, sums: Mapping[str, Any], step: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute the metrics of a logged step.

        Args:
            sums: Sums that the loss returned in this step.
            step: Number of updates so far.

        Returns:
            Mapping from name to metric, and mapping from name to samples for a histogram.
        """
        ...

    def progress(self, step: int) -> str:
        """Describe the data read up to a step for the progress line; the text may be empty."""
        ...

    def first_state(self) -> TrainState: ...

    def evaluate(self, state: TrainState, data: Any) -> dict[str, float]:
        """Compute the held-out metrics, a mapping from name to value.

        Args:
            state: State of the run.
            data: Data that `prepare` returned.
        """
        ...

    def readable(self, held_out: dict[str, float]) -> str:
        """Format held-out metrics as one line."""
        ...

    def describe(self, start: int) -> str:
        """Describe the model, devices and steps of the run from step `start` on, in a few lines."""
        ...


def run(begin: Callable[[], TrainingJob], config: LoopConfig) -> dict[str, float]:
    """Train a run to its end, resuming from the newest checkpoint in its folder if there is one.

    Every process of the run calls this function with the same config.

    Args:
        begin: Function that makes the job of `config`.
        config: Config of the run. Once the job is made, the job's `config` is used instead.

    Returns:
        Mapping from name to held-out metric of the last evaluation.

    Raises:
        ValueError: The config, the data, or the run folder has a mistake.
        NonFiniteLoss: The loss or a gradient became NaN or infinite. The run folder then holds the
            batch and metrics of that step, and all earlier checkpoints that were kept.
    """
    start_time = time.monotonic()
    out = Path(config.out)
    main_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        opened = _open(begin, out, stack)
        job, data, meta, saved = opened.job, opened.data, opened.meta, opened.saved
        config, mesh = job.config, job.trainable.mesh
        stopwatch = Stopwatch(
            config.batch_size * job.seq_len,
            job.step_flops,
            peak_flops(mesh, config.peak_tflops),
            start_time,
        )
        train_step = job.train_step()
        checkpointer = stack.enter_context(
            Checkpointer(out, config.save_every, config.keep, config.keep_every)
        )
        stack.enter_context(ends_when_alone())
        state = restore_or_init(checkpointer, job)
        start = int(state.step)
        if main_process:
            write_atomically(out / "config.json", json.dumps(meta["config"], indent=2) + "\n")
        writer = stack.enter_context(MetricWriter(out, resume_step=start, enabled=main_process))
        progress = stack.enter_context(Progress(config.steps, start, enabled=main_process))
        progress.write(f"{data.summary}\n{job.describe(start)}")
        for change in noted_changes(saved, meta, config) if saved else ():
            progress.write(f"goes on with a change: {change}")
        if line := not_recorded(config.profile, start, config.steps):
            progress.write(line)
        interrupted = stack.enter_context(stop_signals())
        profiler = Profiler(config.profile if main_process else "", out / "profile")
        stack.enter_context(profiler)
        pending: Pending | None = None

        def flush() -> None:
            """Wait for the dispatched step, check it, and report it."""
            nonlocal pending
            if pending is None:
                return
            done, pending = pending, None
            loss, norm = float(done.metrics["loss"]), float(done.metrics["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteLoss(save_evidence(out, done.step, done.batch, done.metrics))
            stopwatch.step_done((done.batch["tokens"].shape[1] - 1) / job.seq_len)
            job.observe(done.metrics["aux"])
            if done.step % config.log_every == 0 or done.step == end:
                names = ("loss", "grad_norm", "learning_rate")
                metrics = {name: done.metrics[name] for name in names}
                shown, histograms = job.step_metrics(done.metrics["aux"], done.step)
                metrics |= shown | stopwatch.report() | memory()
                writer.write(done.step, metrics, histograms)
            progress.update(done.step, loss, stopwatch.tokens_per_second, job.progress(done.step))

        def evaluate(step: int) -> dict[str, float]:
            held_out = job.evaluate(state, data)
            progress.write(f"step {step}: {job.readable(held_out)}")
            return held_out

        def save(step: int) -> None:
            variables = state.variables if job.keeps_frozen else state.params
            checkpointer.save(step, variables, state.rest, {**meta, "step": step}, force=True)

        held_out: dict[str, float] = {}
        batches = stack.enter_context(contextlib.closing(opened.reader.iterate(start)))
        end = min(config.steps, opened.reader.end or config.steps)
        for step in range(start + 1, end + 1):
            with stopwatch.waiting():
                batch = next(batches)
            with profiler.step(step):
                state, metrics = train_step(state, opened.placed(batch))
            # The device computes this step while the host reads the metrics of the previous step.
            flush()
            pending = Pending(step, batch, metrics)
            last = step == end
            every = config.evaluation.every
            if last or (every > 0 and step % every == 0):
                flush()
                held_out = evaluate(step)
                writer.write(step, {f"eval/{name}": value for name, value in held_out.items()})
                stopwatch.resume()
            if profiler.ends_with(step):
                flush()
                profiler.stop()
                stopwatch.resume()
            # Checked once per step: a later signal is seen after the next step.
            stop = (interrupted() or checkpointer.reached_preemption(step)) and not last
            if last or stop or step % config.save_every == 0:
                flush()  # a step is saved only after its loss is known to be finite
                save(step)
                stopwatch.resume()
            if stop:
                progress.write(f"stopped at step {step} and saved it in {out}: run again to go on")
                break
        if not held_out and start >= end:
            held_out = evaluate(start)
        if end < config.steps:
            progress.write(f"ended at step {end} of {config.steps}: no new rows are left")
        progress.write(stopwatch.readable())
    return held_out


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run whose config, data and folder are checked.

    Attributes:
        job: Job of the run.
        data: Data that `job.prepare` returned.
        reader: Reader of batches of the training rows.
        local_rows: Indices `[b]` of the b rows of a batch that this process reads.
        meta: Metadata that the run's checkpoints will hold.
        saved: Metadata of the newest checkpoint; None if there is none.
    """

    job: TrainingJob
    data: Any
    reader: TrainReader
    local_rows: np.ndarray
    meta: dict[str, Any]
    saved: dict[str, Any] | None

    def placed(self, batch: Batch) -> Any:
        """Place the train step's inputs on the mesh, given this process's local rows of a batch."""
        size, mesh = self.job.config.batch_size, self.job.trainable.mesh
        place = lambda rows: place_local(rows, self.local_rows, size, mesh)  # noqa: E731
        return jax.tree.map(place, self.job.inputs(batch))


def _open(begin: Callable[[], TrainingJob], out: Path, stack: contextlib.ExitStack) -> Opened:
    """Check config, data and folder, and lock the folder until `stack` is closed."""
    with sync_errors():
        job = begin()
        config = job.config
        check_continuation(out, load_run_meta(out), config)  # before data are prepared
        data = job.prepare()
        local_rows = rows_here(config.batch_size, job.trainable.mesh)
        reader = job.reader(data, local_rows)
    sources = {"sources": data.sources} if getattr(data, "sources", None) else {}
    meta = {
        "config": as_json(config),
        "resolved": resolved(job.trainable),
        "data_fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer.to_json(),
        "python": platform.python_version(),  # whose library is the corpus stdlib
        **sources,
        **job.meta,
    }
    own = {"distributed": None, "data": {**meta["config"]["data"], "cache_dir": None}}
    assert_same_on_all_hosts("config", meta["config"] | own)
    assert_same_on_all_hosts("the fingerprint of the data", data.fingerprint)
    assert_same_on_all_hosts("the checksum of the frozen weights", meta.get("base"))
    stack.enter_context(run_lock(out))
    with sync_errors():
        saved = load_run_meta(out)  # now nobody else writes
        check_continuation(out, saved, config)
        check_data(out, saved, data.fingerprint)
        check_base(out, saved, job.meta)
    return Opened(job, data, reader, local_rows, meta, saved)


class Resumable(Protocol):
    """The part of a `TrainingJob` that `restore_or_init` uses."""

    config: Any
    trainable: Trainable
    keeps_frozen: bool

    def first_state(self) -> TrainState: ...


def restore_or_init(checkpointer: Checkpointer, job: Resumable) -> TrainState:
    """Restore the newest checkpoint of the run folder, or make the initial state if none exists."""
    newest = checkpointer.latest_step()
    assert_same_on_all_hosts("the newest checkpoint", newest)
    if newest is None:
        return job.first_state()
    abstract = job.trainable.abstract
    kept = abstract.variables if job.keeps_frozen else abstract.params
    step, variables, rest, _ = checkpointer.restore(kept, abstract.rest, newest)
    if not job.keeps_frozen:
        variables = dataclasses.replace(job.first_state(), params=variables).variables
    if jax.process_index() == 0:
        print(f"continuing {job.config.out} from step {step}", file=sys.stderr)
    return rest.with_variables(variables)


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """Context manager that turns SIGTERM and the first Ctrl-C into a flag for the training loop.

    With several processes the flag stays False: jax takes SIGTERM as the notice of a preemption,
    and all processes agree on a step to stop at (`Checkpointer.reached_preemption`). A Ctrl-C is
    then passed on as a SIGTERM.

    Yields:
        Function without arguments that returns the flag.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if is_multiprocess():
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if is_multiprocess() else (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda: bool(received) and not is_multiprocess()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
