"""The training loop of reinforcement learning, readable top to bottom."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from train.cli.config_json import as_json
from train.devices.distributed import assert_same_on_all_hosts, ends_when_alone, sync_errors
from train.engine.loop import NonFiniteLoss, restore_or_init, stop_signals
from train.rl.job import RLJob
from train.rl.learning.reference import ReferenceCheckpointer
from train.rl.reports import (
    examples,
    readable_evaluation,
    readable_step,
    readable_time,
    save_rollouts,
    scorer_error,
)
from train.rl.types import Collected
from train.runs.files import write_atomically
from train.runs.instruments import Profiler, memory, not_recorded
from train.runs.metadata import load_run_meta
from train.runs.metrics import MetricWriter, Progress
from train.runs.resume import noted_changes
from train.runs.run_folder import (
    check_base,
    check_continuation,
    check_data,
    run_lock,
)


def train(job: RLJob) -> dict[str, float]:
    """Run a job to its last step; resume from the run folder if it has a checkpoint.

    With several processes, each process calls this function with a job of the same config. All
    processes draw the same problems and hold the same search trees, budgets and trajectories. Rows
    are sharded over all devices, and the processes divide the work of scorers and environments.

    Args:
        job: Job of the run, whose run folder is `job.config.out`.

    Returns:
        Metrics of the last held-out evaluation, by name; empty if a resumed run was stopped by a
        signal before its first evaluation.

    Raises:
        ValueError: The config, the task or the run folder is invalid, a reward is not a finite
            number, or scoring failed for every response of a step.
        NonFiniteLoss: A metric or the policy is NaN or infinite; the checkpoints before that step
            are untouched.
    """
    config = job.config
    out = Path(config.out)
    main_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        meta = job.meta
        with sync_errors():
            check_continuation(out, load_run_meta(out), config)
        assert_same_on_all_hosts("config", {**meta["config"], "distributed": None})
        assert_same_on_all_hosts("the fingerprint of the task", meta["data_fingerprint"])
        assert_same_on_all_hosts("the checksum of the frozen weights", meta["base"])
        stack.enter_context(run_lock(out))
        with sync_errors():
            saved = load_run_meta(out)  # read again, as no other process writes now
            check_continuation(out, saved, config)
            check_data(out, saved, meta["data_fingerprint"])
            check_base(out, saved, meta)
        checkpointer = stack.enter_context(
            ReferenceCheckpointer(
                out, config.save_every, config.keep, config.keep_every, job.reference
            )
        )
        stack.enter_context(ends_when_alone())
        state = restore_or_init(checkpointer, job)
        if saved:
            job.restore(saved)
        start = job.steps_done
        if main_process:
            write_atomically(out / "config.json", json.dumps(as_json(config), indent=2) + "\n")
        writer = stack.enter_context(
            MetricWriter(out, resume_step=start or -1, enabled=main_process)
        )
        progress = stack.enter_context(Progress(config.steps, start, enabled=main_process))
        progress.write(job.describe())
        for change in noted_changes(saved, meta, config) if saved else ():
            progress.write(f"goes on with a change: {change}")
        if line := not_recorded(config.profile, start, config.steps):
            progress.write(line)
        interrupted = stack.enter_context(stop_signals())
        profiler = Profiler(config.profile if main_process else "", out / "profile")
        stack.enter_context(profiler)
        told = False
        spent = {"rollout_seconds": 0.0, "update_seconds": 0.0}

        def check(step: int, metrics: dict[str, float], collected: Collected) -> None:
            """Raise an error if a metric is not finite, or if every rollout failed to be scored.

            The first failure of a scorer or an environment is printed, once in a run.
            """
            nonlocal told
            error = scorer_error(collected)
            if error and not told:
                progress.write(
                    f"step {step}: the first failure of a scorer or an environment:\n{error}"
                )
                told = True
            rewards = [row.reward for row in collected.drawn]
            if rewards and all(r.error or r.info.get("scorer_errors") == 1 for r in rewards):
                # Steps run on a thread of their own, which signals and some connections refuse.
                threads = hasattr(job.task, "step") and config.environment_limit_s is not None
                or_by = ", or try --environment-limit-s None" if threads else ""
                raised = metrics.get("info/scorer_errors") == 1
                how = (
                    f"the scorer of {job.task.name} raised" if raised else f"{job.task.name} failed"
                )
                raise ValueError(
                    f"step {step}: {how} for every response, "
                    f"{error.strip().rpartition(chr(10))[2] or 'as its info says'}: mend it{or_by}"
                )
            bad = [name for name, value in metrics.items() if not math.isfinite(value)]
            if bad:
                where = out / f"nonfinite-step-{step}"
                if main_process:
                    save_rollouts(where, metrics, collected)
                raise NonFiniteLoss(
                    f"step {step}: {bad[0]} is {metrics[bad[0]]}: stopped; its rollouts and "
                    f"metrics are in {where}, the last checkpoint is untouched; look at the "
                    "rollouts, or lower optimizer.learning_rate"
                )

        def report(step: int, metrics: dict[str, float], collected: Collected) -> None:
            writer.write(step, metrics | memory())
            seconds = (time.monotonic() - clock) / (step - start) * (config.steps - step)
            left = f", {tqdm.format_interval(seconds)} left"
            progress.write(readable_step(step, metrics, collected) + left)

        def evaluate(step: int, written: bool = False) -> dict[str, float]:
            """Evaluate on held-out problems, and write the metrics unless they are `written`."""
            with finite(step):
                found, rows = job.evaluate(state.variables)
            if not written:
                writer.write(step, {f"eval/{name}": value for name, value in found.items()})
            progress.write(f"step {step}: {readable_evaluation(found)}")
            for line in examples(rows, config.examples):
                progress.write(line)
            return found

        def save(step: int) -> None:
            variables = state.variables if job.keeps_frozen else state.params
            checkpointer.save(step, variables, state.rest, {**job.meta, "step": step}, force=True)

        held_out = evaluate(0) if start == 0 else {}
        clock = time.monotonic()
        for step in range(start + 1, config.steps + 1):
            with profiler.step(step), finite(step):
                state, metrics, collected = job.step(state)
            check(step, metrics, collected)
            for name in spent:
                spent[name] += metrics[name]
            last = step == config.steps
            if step % config.log_every == 0 or last:
                report(step, metrics, collected)
            if last or (config.evaluation.every and step % config.evaluation.every == 0):
                held_out = evaluate(step)
            if profiler.ends_with(step):
                profiler.stop()
            stop = (interrupted() or checkpointer.reached_preemption(step)) and not last
            if last or stop or step % config.save_every == 0:
                save(step)
            if stop:
                progress.write(f"stopped at step {step} and saved it in {out}: run again to go on")
                break
        if start >= config.steps:
            held_out = evaluate(start, written=True)
        progress.write(readable_time(spent, time.monotonic() - clock))
    return held_out


@contextlib.contextmanager
def finite(step: int) -> Iterator[None]:
    """Context manager that turns a diverged policy's `FloatingPointError` into a `NonFiniteLoss`.

    Args:
        step: Number of the step, for the message.
    """
    try:
        yield
    except FloatingPointError as error:
        raise NonFiniteLoss(
            f"step {step}: {error}: stopped; the last checkpoint is untouched; lower "
            "optimizer.learning_rate"
        ) from error
