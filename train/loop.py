"""The training loop, readable top to bottom."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from train import evaluate
from train.checkpoint import Checkpointer, load_meta
from train.config import RunConfig, as_json, noted_changes
from train.data import Batch, TrainReader, load_tokenizer, prepare
from train.distributed import agreed, check_same, ends_when_alone, several
from train.instruments import Profiler, Stopwatch, memory, peak_flops
from train.mesh import check_batch, make_mesh, place_local, rows_here
from train.metrics import MetricWriter, Progress
from train.plan import describe
from train.run_folder import (
    check_continuation,
    check_fingerprint,
    check_shared,
    only_run_in,
    save_evidence,
    write_whole,
)
from train.state import Trainable, TrainState, make_trainable
from train.statistics import readable as fork_metrics
from train.statistics import score_samples
from train.step import make_train_step


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose metrics are not read yet."""

    step: int  # number of updates once it is done
    batch: Batch
    metrics: dict[str, Any]


def train(config: RunConfig) -> dict[str, float]:
    """Run (or continue) a pretraining run to its end and return the final held-out metrics.

    Every process of the run calls it with the same config.

    Raises:
        ValueError: a mistake in the config, the data, or the run folder.
        NonFiniteLoss: the run folder then holds the batch and metrics of that step, and the
            checkpoints before it.
    """
    born = time.monotonic()
    out = Path(config.out)
    main_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with agreed():
            trainable = make_run(config)
            saved = load_meta(out)
            check_continuation(out, saved, config)
            data = prepare(config.data)
            check_fingerprint(out, saved, data)
            mesh = trainable.mesh
            held = rows_here(config.batch_size, mesh)
            reader = TrainReader(data.train, config.batch_size, config.data.seed, held)
            stack.enter_context(only_run_in(out))
        stopwatch = Stopwatch(
            config.batch_size * config.data.seq_len,
            config.step_flops,
            peak_flops(mesh, config.peak_tflops),
            born,
        )
        meta = {
            "config": as_json(config),
            "data_fingerprint": data.fingerprint,
            "tokenizer": data.tokenizer.to_json(),
        }
        own = {"distributed": None, "data": {**meta["config"]["data"], "cache_dir": None}}
        check_same("config", meta["config"] | own)
        check_same("the fingerprint of the data", data.fingerprint)
        check_shared(out)
        train_step = make_train_step(trainable, config.accumulate)
        eval_batch = config.batch_size // config.accumulate
        evaluator = evaluate.Evaluator(trainable, eval_batch, config.evaluation)
        checkpointer = stack.enter_context(
            Checkpointer(out, config.save_every, config.keep, config.keep_every)
        )
        stack.enter_context(ends_when_alone())
        state = restore_or_init(checkpointer, trainable, out)
        start = int(state.step)
        if main_process:
            write_whole(out / "config.json", json.dumps(meta["config"], indent=2) + "\n")
        writer = stack.enter_context(MetricWriter(out, resume_step=start, enabled=main_process))
        progress = stack.enter_context(Progress(config.steps, start, enabled=main_process))
        progress.write(f"{data.summary}\n{describe(config, trainable, start)}")
        for change in noted_changes(saved["config"], meta["config"]) if saved else ():
            progress.write(f"not the run that was begun: {change}")
        interrupted = stack.enter_context(stop_signals())
        profiler = Profiler(config.profile if main_process else "", out / "profile")
        stack.enter_context(profiler)

        def finish(pending: Pending) -> None:
            """Wait for a dispatched step, check it, and report it."""
            loss, norm = float(pending.metrics["loss"]), float(pending.metrics["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteLoss(
                    save_evidence(out, pending.step, pending.batch, pending.metrics)
                )
            stopwatch.step_done()
            if pending.step % config.log_every == 0 or pending.step == config.steps:
                metrics = {
                    name: pending.metrics[name] for name in ("loss", "grad_norm", "learning_rate")
                }
                forks, layers = pending.metrics["forks"], config.model.fork_layers
                metrics |= fork_metrics(forks, layers) | stopwatch.report() | memory()
                writer.write(pending.step, metrics, score_samples(forks, layers))
            progress.update(pending.step, loss, stopwatch.tokens_per_second)

        def save(step: int) -> None:
            meta_of_step = {**meta, "step": step}
            checkpointer.save(step, state.weights, state.rest, meta_of_step, force=True)

        held_out: dict[str, float] = {}
        pending: Pending | None = None
        batches = stack.enter_context(contextlib.closing(reader.iterate(start)))
        for step in range(start + 1, config.steps + 1):
            with stopwatch.waiting():
                batch = next(batches)
            with profiler.step(step):
                tokens = place_local(batch["tokens"], held, config.batch_size, mesh)
                state, metrics = train_step(state, tokens)
            # The device works on this step while the host reads the one before.
            if pending is not None:
                finish(pending)
            pending = Pending(step, batch, metrics)
            last = step == config.steps
            every = config.evaluation.every
            to_evaluate = last or (every > 0 and step % every == 0)
            if to_evaluate:
                finish(pending)
                pending = None
                held_out = evaluator(state.weights, data.validation)
                writer.write(step, {f"eval/{name}": value for name, value in held_out.items()})
                progress.write(f"step {step}: {evaluate.readable(held_out)}")
                stopwatch.resume()
            if profiler.ends_with(step):
                if pending is not None:
                    finish(pending)
                    pending = None
                profiler.stop()
                stopwatch.resume()
            # Read once: a signal that comes later is seen after the next step.
            stop = (interrupted() or checkpointer.reached_preemption(step)) and not last
            if last or stop or step % config.save_every == 0:
                # Nothing is saved of a step that has not been seen to be finite.
                if pending is not None:
                    finish(pending)
                    pending = None
                save(step)
                stopwatch.resume()
            if stop:
                progress.write(f"stopped at step {step} and saved it in {out}: run again to go on")
                break
        if not held_out and start >= config.steps:
            held_out = evaluator(state.weights, data.validation)
            progress.write(f"step {start}: {evaluate.readable(held_out)}")
        progress.write(stopwatch.readable())
    return held_out


def make_run(config: RunConfig) -> Trainable:
    """Check a config and describe its state; nothing is allocated."""
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)
    check_vocabulary(config)
    return make_trainable(
        config.model, config.optimizer, config.steps, mesh, config.seed, config.attention
    )


def check_vocabulary(config: RunConfig) -> None:
    """Raise if the tokenizer knows ids that the model has no embedding for."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    size = tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {size} ids, model.vocab_size="
            f"{config.model.vocab_size}: pass --model.vocab-size {-(-size // 64) * 64}"
        )


def restore_or_init(checkpointer: Checkpointer, trainable: Trainable, out: Path) -> TrainState:
    """The newest checkpoint of the run folder, or the initial state."""
    newest = checkpointer.latest_step()
    check_same("the newest checkpoint", newest)
    if newest is None:
        return trainable.init()
    abstract = trainable.abstract
    step, weights, rest, _ = checkpointer.restore(abstract.weights, abstract.rest, newest)
    if jax.process_index() == 0:
        print(f"continuing {out} from step {step}", file=sys.stderr)
    return rest.with_weights(weights)


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """Turn SIGTERM and the first Ctrl-C into a flag that the loop reads between steps.

    With several processes jax takes SIGTERM as the notice of a preemption, after which all of them
    find one step to stop at (`Checkpointer.reached_preemption`); a Ctrl-C becomes a SIGTERM.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if several():
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if several() else (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda: bool(received) and not several()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
