"""The loop of reinforcement learning, readable top to bottom."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from train.cli.config_json import as_json
from train.engine.loop import NonFiniteLoss, restore_or_init, stop_signals
from train.rl.job import RLJob
from train.rl.types import Collected, Trajectory
from train.runs.checkpoint import Checkpointer, load_meta
from train.runs.instruments import Profiler, memory, not_recorded
from train.runs.metrics import MetricWriter, Progress
from train.runs.resume import noted_changes
from train.runs.run_folder import (
    check_base,
    check_continuation,
    check_data,
    run_lock,
    write_whole,
)

SHOWN = 60  # characters of a prompt or a text in the progress view


def train(work: RLJob) -> dict[str, float]:
    """Run (or continue) a run to its end and return the final held-out metrics.

    Raises:
        ValueError: a mistake in the config, the task, or the run folder; a reward that is no
            number.
        NonFiniteLoss: checkpoints before that step are untouched.
    """
    config = work.config
    out = Path(config.out)
    if jax.process_count() > 1:
        raise ValueError(
            f"reinforcement learning runs in one process, here are {jax.process_count()}: start "
            "one, on all devices that it sees"
        )
    with contextlib.ExitStack() as stack:
        check_continuation(out, load_meta(out), config)
        stack.enter_context(run_lock(out))
        saved = load_meta(out)  # now nobody else writes
        check_continuation(out, saved, config)
        check_data(out, saved, work.meta["data_fingerprint"])
        check_base(out, saved, work.meta)
        checkpointer = stack.enter_context(
            Checkpointer(out, config.save_every, config.keep, config.keep_every)
        )
        state = restore_or_init(checkpointer, work)
        if saved:
            work.restore(saved)
        start = work.progressed.step
        write_whole(out / "config.json", json.dumps(as_json(config), indent=2) + "\n")
        writer = stack.enter_context(MetricWriter(out, resume_step=start or -1))
        progress = stack.enter_context(Progress(config.steps, start))
        progress.write(work.describe())
        for change in noted_changes(saved, work.meta, config) if saved else ():
            progress.write(f"not the run that was begun: {change}")
        if line := not_recorded(config.profile, start, config.steps):
            progress.write(line)
        interrupted = stack.enter_context(stop_signals())
        profiler = Profiler(config.profile, out / "profile")
        stack.enter_context(profiler)

        def evaluate(step: int, known: bool = False) -> dict[str, float]:
            with finite(step):
                found, rows = work.evaluate(state.weights)
            if not known:
                writer.write(step, {f"eval/{name}": value for name, value in found.items()})
            progress.write(f"step {step}: {readable_evaluation(found)}")
            for line in examples(rows, config.examples):
                progress.write(line)
            return found

        held_out = evaluate(0) if start == 0 else {}
        clock = time.monotonic()
        spent = {"rollout_seconds": 0.0, "update_seconds": 0.0}
        for step in range(start + 1, config.steps + 1):
            with profiler.step(step), finite(step):
                state, metrics, collected = work.step(state)
            bad = [name for name, value in metrics.items() if not math.isfinite(value)]
            if bad:
                where = save_rollouts(out, step, metrics, collected)
                raise NonFiniteLoss(
                    f"step {step}: {bad[0]} is {metrics[bad[0]]}: stopped; its rollouts and "
                    f"metrics are in {where}, the last checkpoint is untouched; look at the "
                    "rollouts, or lower optimizer.learning_rate"
                )
            for name in spent:
                spent[name] += metrics[name]
            last = step == config.steps
            if step % config.log_every == 0 or last:
                writer.write(step, metrics | memory())
                seconds = (time.monotonic() - clock) / (step - start) * (config.steps - step)
                left = f", {tqdm.format_interval(seconds)} left"
                progress.write(readable_step(step, metrics, collected) + left)
            if last or (config.evaluation.every and step % config.evaluation.every == 0):
                held_out = evaluate(step)
            if profiler.ends_with(step):
                profiler.stop()
            stop = interrupted() and not last
            if last or stop or step % config.save_every == 0:
                weights = state.weights if work.keeps_frozen else state.params
                checkpointer.save(
                    step, weights, state.rest, {**work.meta, "step": step}, force=True
                )
            if stop:
                progress.write(f"stopped at step {step} and saved it in {out}: run again to go on")
                break
        if start >= config.steps:
            held_out = evaluate(start, known=True)
        progress.write(readable_time(spent, time.monotonic() - clock))
    return held_out


@contextlib.contextmanager
def finite(step: int) -> Iterator[None]:
    """A policy that has diverged ends the run."""
    try:
        yield
    except FloatingPointError as error:
        raise NonFiniteLoss(
            f"step {step}: {error}: stopped; the last checkpoint is untouched; lower "
            "optimizer.learning_rate"
        ) from error


def save_rollouts(out: Path, step: int, metrics: dict[str, float], collected: Collected) -> Path:
    """Keep the texts, rewards and metrics of a step that went wrong."""
    folder = out / f"nonfinite-step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: str(value) for name, value in metrics.items()}
    (folder / "metrics.json").write_text(json.dumps(shown, indent=2))
    lines = [
        {"prompt": row.problem.prompt, "texts": row.texts, "reward": str(row.reward.value)}
        for row in collected.trajectories
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def readable_step(step: int, metrics: dict[str, float], collected: Collected) -> str:
    """One line of what matters."""
    parts = [
        f"step {step}: reward {metrics['reward']:.3f}",
        f"success {metrics['success']:.1%}",
        f"length {metrics['length']:.1f}",
    ]
    if "ref_kl" in metrics:
        parts.append(f"KL {metrics['ref_kl']:.4f}")
    if "clipped" in metrics:
        parts.append(f"clipped {metrics['clipped']:.1%}")
    if "invocation_rate" in metrics:
        parts.append(f"invoked {metrics['invocation_rate']:.0%}")
    if collected.kept < collected.groups:
        parts.append(f"{collected.kept} of {collected.groups} problems kept")
    if not collected.kept:
        parts.append("nothing to learn from: all rollouts of each problem agree")
    parts.append(f"{metrics['rollout_tokens_per_second']:,.0f} tok/s")
    return ", ".join(parts)


def readable_evaluation(found: dict[str, float]) -> str:
    """One line."""
    line = (
        f"held-out success {found['success']:.1%} ± {found['standard_error']:.1%}, reward "
        f"{found['reward']:.3f}, length {found['length']:.1f}"
    )
    if "invocations" in found:
        line += f", {found['invocations']:.2f} invocations ({found['invocation_rate']:.0%})"
    return line


def examples(rows: Sequence[Trajectory], count: int) -> list[str]:
    """A few texts with their rewards, a line each."""
    shown = []
    for row in rows[:count]:
        prompt, text = (_cut(words) for words in (row.problem.prompt, " | ".join(row.texts)))
        shown.append(f"    {prompt} -> {text}   ({row.reward.value:g})")
    return shown


def _cut(text: str) -> str:
    text = repr(text)[1:-1]
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def readable_time(spent: dict[str, float], total: float) -> str:
    """Where the time went."""
    total = max(total, 1e-9)
    rollout, update = (spent[name] / total for name in ("rollout_seconds", "update_seconds"))
    return f"{total:.0f} s: rollouts {rollout:.0%}, updates {update:.0%}"
