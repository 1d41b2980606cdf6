"""The training loop, readable top to bottom."""

import contextlib
import dataclasses
import fcntl
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
import numpy as np

from train import evaluate
from train.checkpoint import Checkpointer, load_meta
from train.config import RunConfig, as_json, differences, noted_changes
from train.data import Batch, PackedData, TrainReader, load_tokenizer, prepare
from train.mesh import batch_part, check_batch, make_mesh, place_local
from train.metrics import MetricWriter, Progress, Throughput
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

    Raises:
        ValueError: a mistake in the config, the data, or the run folder.
        NonFiniteLoss: the run folder then holds the batch and metrics of that step, and the
            checkpoints before it.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)
    check_vocabulary(config)
    out = Path(config.out)
    saved = load_meta(out)
    check_continuation(out, saved, config)
    trainable = make_trainable(config.model, config.optimizer, config.steps, mesh, config.seed)
    train_step = make_train_step(trainable, config.accumulate)
    eval_batch = config.batch_size // config.accumulate
    evaluator = evaluate.Evaluator(trainable, eval_batch, config.evaluation)
    data = prepare(config.data)
    check_fingerprint(out, saved, data)
    reader = TrainReader(data.train, config.batch_size, config.data.seed, *batch_part(mesh))
    main_process = jax.process_index() == 0
    meta = {
        "config": as_json(config),
        "data_fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer.to_json(),
    }

    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run_in(out))
        checkpointer = stack.enter_context(
            Checkpointer(out, config.save_every, config.keep, config.keep_every)
        )
        state = restore_or_init(checkpointer, trainable, out)
        start = int(state.step)
        if main_process:
            write_whole(out / "config.json", json.dumps(meta["config"], indent=2) + "\n")
        writer = stack.enter_context(MetricWriter(out, resume_step=start, enabled=main_process))
        progress = stack.enter_context(Progress(config.steps, start, enabled=main_process))
        progress.write(describe(config, data, trainable, start))
        for change in noted_changes(saved["config"], meta["config"]) if saved else ():
            progress.write(f"not the run that was begun: {change}")
        interrupted = stack.enter_context(stop_signals())
        throughput = Throughput()

        def finish(pending: Pending) -> None:
            """Wait for a dispatched step, check it, and report it."""
            loss, norm = float(pending.metrics["loss"]), float(pending.metrics["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteLoss(save_evidence(out, pending, loss, norm))
            throughput.update(config.batch_size * config.data.seq_len)
            if pending.step % config.log_every == 0 or pending.step == config.steps:
                metrics = {
                    name: pending.metrics[name] for name in ("loss", "grad_norm", "learning_rate")
                }
                forks, layers = pending.metrics["forks"], config.model.fork_layers
                metrics |= fork_metrics(forks, layers)
                if throughput.rate is not None:
                    metrics["tokens_per_second"] = throughput.rate
                writer.write(pending.step, metrics, score_samples(forks, layers))
            progress.update(pending.step, loss, throughput.rate)

        def save(step: int) -> None:
            meta_of_step = {**meta, "step": step}
            checkpointer.save(step, state.weights, state.rest, meta_of_step, force=True)

        held_out: dict[str, float] = {}
        pending: Pending | None = None
        batches = stack.enter_context(contextlib.closing(reader.iterate(start)))
        for step in range(start + 1, config.steps + 1):
            batch = next(batches)
            state, metrics = train_step(state, place_local(batch["tokens"], mesh))
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
                throughput.restart()
            # Read once: a signal that comes later is seen after the next step.
            stop = (interrupted() or checkpointer.reached_preemption(step)) and not last
            if last or stop or step % config.save_every == 0:
                # Nothing is saved of a step that has not been seen to be finite.
                if pending is not None:
                    finish(pending)
                    pending = None
                save(step)
            if stop:
                progress.write(f"stopped at step {step} and saved it in {out}: run again to go on")
                break
        if not held_out and start >= config.steps:
            held_out = evaluator(state.weights, data.validation)
            progress.write(f"step {start}: {evaluate.readable(held_out)}")
    return held_out


def check_vocabulary(config: RunConfig) -> None:
    """Raise if the tokenizer knows ids that the model has no embedding for."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    size = tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {size} ids, model.vocab_size="
            f"{config.model.vocab_size}: pass --model.vocab-size {-(-size // 64) * 64}"
        )


def check_continuation(out: Path, saved: dict[str, Any] | None, config: RunConfig) -> None:
    """Raise if `out` holds a run that this config would not continue."""
    found = differences(saved["config"], as_json(config)) if saved else []
    if found:
        raise ValueError(
            f"{out} holds a run of another config ({'; '.join(found[:3])}"
            f"{'; ...' if len(found) > 3 else ''}): pass another --out, or the saved values"
        )


def check_fingerprint(out: Path, saved: dict[str, Any] | None, data: PackedData) -> None:
    """Raise if `out` holds a run on other data."""
    if saved and saved["data_fingerprint"] != data.fingerprint:
        raise ValueError(
            f"{out} was trained on data {saved['data_fingerprint']}, the corpus is now "
            f"{data.fingerprint}: restore the corpus, or pass another --out"
        )


@contextlib.contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Hold the run folder: a second run in it would overwrite the first one's files."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f".lock-{jax.process_index()}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is going on in {out}: pass another --out") from None
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def restore_or_init(checkpointer: Checkpointer, trainable: Trainable, out: Path) -> TrainState:
    """The newest checkpoint of the run folder, or the initial state."""
    if checkpointer.latest_step() is None:
        return trainable.init()
    abstract = trainable.abstract
    step, weights, rest, _ = checkpointer.restore(abstract.weights, abstract.rest)
    print(f"continuing {out} from step {step}", file=sys.stderr)
    return rest.with_weights(weights)


def describe(config: RunConfig, data: PackedData, trainable: Trainable, start: int) -> str:
    """What is about to run, for a person."""
    model, mesh = config.model, trainable.mesh
    flops = 3 * model.forward_flops(config.data.seq_len) * config.batch_size
    forks = (
        f"forks before layers {model.fork_layers}, {model.policy}" if model.fork_layers else "plain"
    )
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{data.summary}\n"
        f"{model.num_params():,} parameters, {forks}; {flops / 1e9:.1f} GFLOP a step; "
        f"{mesh.size} {mesh.devices.flat[0].device_kind} ({sizes}); steps {start} to {config.steps}"
    )


def save_evidence(out: Path, pending: Pending, loss: float, norm: float) -> str:
    """Keep the batch and metrics of a step whose loss is not finite; returns the error line."""
    folder = out / f"nonfinite-step-{pending.step}"
    folder.mkdir(parents=True, exist_ok=True)
    batch = folder / f"batch-{jax.process_index()}.npz"
    np.savez(batch, tokens=pending.batch["tokens"], rows=pending.batch["rows"])
    forks = {name: np.asarray(sums).tolist() for name, sums in pending.metrics["forks"].items()}
    rate = float(pending.metrics["learning_rate"])
    evidence = {"step": pending.step, "loss": str(loss), "grad_norm": str(norm), "forks": forks}
    (folder / "metrics.json").write_text(json.dumps({**evidence, "learning_rate": rate}, indent=2))
    return (
        f"step {pending.step}: loss {loss}, gradient norm {norm}: stopped; its batch and metrics "
        f"are in {folder}, the last checkpoint is untouched; look at the batch, or lower "
        "optimizer.learning_rate"
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """Turn SIGTERM and the first Ctrl-C into a flag that the loop reads between steps."""
    received: list[float] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(time.monotonic())

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
