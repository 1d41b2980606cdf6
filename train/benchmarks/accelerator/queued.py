"""Train the runs that a file lists, on packed corpora, in the benchmark's remaining time.

The file has one JSON object on each line: `{"name": "plain30m", "model": {"preset": "150m",
"embed_dim": 512, "num_heads": 8, "fork_layers": []}, "corpus": "corpus.npy", "vocab_size": 8192,
"steps": 2000, "seeds": [0, 1]}`.
"""

import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from thoughtbubbles import ModelConfig
from thoughtbubbles.fields import read_text
from train.benchmarks.accelerator.record import Record, TimeIsUp
from train.cli.config_json import as_json, from_json, model_from_json
from train.devices.hardware import chip_of
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, TrainState, make_trainable
from train.engine.step import make_train_step
from train.runs.checkpoint import Checkpointer, load_meta

SAVE_SECONDS = 60.0
POINTS = 200  # of a loss curve


@dataclasses.dataclass(frozen=True)
class QueuedRun:
    """A training run of the file that `--then` names.

    Attributes:
        name: Name of the run, of letters, digits, `-`, `_` and `.`.
        model: Config of the decoder.
        corpus: Path of a `.npy` file of N token ids of concatenated documents, `[N]`, uint16 or
            uint32.
        vocab_size: Number of token ids of the corpus.
        steps: Number of optimizer steps.
        seeds: Seeds of parameters and batches; the run is repeated with each seed.
        batch_size: Number of rows per step.
        seq_len: Number of targets per row.
        held_out: Number of rows at the end of the corpus that are held out of training and scored
            after the last step.
        optimizer: Optimizer and learning rate schedule.
    """

    name: str
    model: ModelConfig
    corpus: str
    vocab_size: int
    steps: int
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 32
    seq_len: int = 512
    held_out: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise ValueError(f"name={self.name!r}: choose letters, digits, '-', '_' and '.'")
        for field in ("steps", "batch_size", "seq_len", "held_out"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"{field}={value!r}: choose a whole number of 1 or more")
        whole = all(type(seed) is int and 0 <= seed < 2**63 for seed in self.seeds)
        if not whole or not 0 < len(self.seeds) == len(set(self.seeds)):
            raise ValueError(
                f"seeds={list(self.seeds)}: choose one or more different whole numbers of 0 or more"
            )
        if self.model.vocab_size != self.vocab_size:
            raise ValueError(
                f"the corpus {self.corpus} has vocab_size={self.vocab_size} and the model "
                f"vocab_size={self.model.vocab_size}: leave it out of the model"
            )

    def tokens(self) -> np.ndarray:
        """Open the corpus as a memory-mapped array `[N]`, uint16 or uint32, and check its tokens.

        Raises:
            ValueError: The file is not an array of this kind, has too few tokens, or has a token id
                beyond `vocab_size`.
        """
        try:
            tokens = np.load(self.corpus, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"corpus {self.corpus} is no .npy file that opens: {error}") from error
        if not isinstance(tokens, np.ndarray):
            raise ValueError(f"corpus {self.corpus} holds several arrays: write a .npy file of one")
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"corpus {self.corpus} is {tokens.dtype}{list(tokens.shape)}: write one row of "
                "uint16 or uint32"
            )
        least = (self.held_out + 2) * self.seq_len + 1
        if len(tokens) < least:
            raise ValueError(
                f"corpus {self.corpus} has {len(tokens)} tokens, seq_len={self.seq_len} and "
                f"held_out={self.held_out} need {least}: choose smaller ones"
            )
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise ValueError(
                f"corpus {self.corpus} holds token id {largest}, vocab_size={self.vocab_size}: "
                "give the vocabulary size of the tokenizer that wrote it"
            )
        return tokens


def read_queue(path: str) -> list[QueuedRun]:
    """Read the runs that a file lists, and check the runs and their corpora.

    Raises:
        ValueError: The file is not text, a line is wrong (the message names file and line), two
            runs have the same name, or there is no run.
    """
    runs = []
    for number, line in enumerate(read_text(Path(path)).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            runs.append(_run_of(json.loads(line), Path(path).parent))
            runs[-1].tokens()
        except (ValueError, TypeError, RecursionError) as error:  # json's error is a ValueError
            raise ValueError(f"{path}, line {number}: {error}") from error
    names = [run.name for run in runs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}: two runs are named {repeated!r}: give each its own name")
    if not runs:
        raise ValueError(f"{path} holds no run: write one JSON object a line")
    return runs


def _run_of(fields: Any, folder: Path) -> QueuedRun:
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r} is no JSON object")
    known = [field.name for field in dataclasses.fields(QueuedRun)]
    if unknown := sorted(fields.keys() - set(known)):
        raise ValueError(f"unknown field {unknown[0]!r}: choose from {', '.join(known)}")
    needed = [f.name for f in dataclasses.fields(QueuedRun) if f.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"the field {missing[0]!r} is missing")
    kinds = {"name": str, "model": dict, "corpus": str, "seeds": list, "optimizer": dict}
    for name, kind in kinds.items():
        if name in fields and not isinstance(fields[name], kind):
            written = {str: "a text", dict: "an object {...}", list: "a list [...]"}[kind]
            raise ValueError(f"{name}={fields[name]!r}: write {written}")
    model = dict(fields["model"])
    preset = model.pop("preset", None)
    base = {"architecture": "thoughtbubbles"}
    if preset is not None:
        base = as_json(ModelConfig.preset(preset, vocab_size=fields["vocab_size"]))
    model = model_from_json(base | {"vocab_size": fields["vocab_size"]} | model)
    optimizer = fields.get("optimizer", {})
    options = [field.name for field in dataclasses.fields(OptimizerConfig)]
    if unknown := sorted(optimizer.keys() - set(options)):
        raise ValueError(
            f"unknown option {unknown[0]!r} of optimizer: choose from {', '.join(options)}"
        )
    corpus = os.fspath(folder / fields["corpus"])  # an absolute path stays as it is
    seeds = tuple(fields.get("seeds", (0,)))
    return QueuedRun(
        **fields
        | {
            "model": model,
            "corpus": corpus,
            "seeds": seeds,
            "optimizer": from_json(OptimizerConfig, optimizer, "optimizer"),
        }
    )


def measure_queue(record: Record, path: str, retry: bool = True) -> None:
    """Train the runs that a file lists, in order, each with all of its seeds before the next run.

    Args:
        record: Record of the part.
        path: File of runs.
        retry: Whether to train runs again that failed before.

    Raises:
        TimeIsUp: The time limit was reached; an unfinished run has saved a checkpoint.
        ValueError: The file has a mistake, or a run of the same name was begun with other settings.
    """
    for run in read_queue(path):
        for seed in run.seeds:
            name = f"{run.name} seed {seed}"
            identity = as_json(run) | {"seeds": [seed]}
            known = record.data.setdefault("runs", {})
            failed = "error" in record.measurements.get(name, {})
            begun = load_meta(_folder(record, run, seed)) is not None
            if known.get(name, identity) != identity and (begun or not failed):
                raise ValueError(
                    f"{name} of {record.folder} had other settings: give the changed run a name of "
                    "its own"
                )
            known[name] = identity
            if failed and retry:  # it may have been mended since
                del record.measurements[name]
            record.measure(name, functools.partial(_train, record, run, seed, identity))


def _folder(record: Record, run: QueuedRun, seed: int) -> Path:
    """Return the folder of a run's checkpoints."""
    return record.folder / "then" / f"{run.name}-{seed}"


@dataclasses.dataclass
class _Clock:
    """Timer of train steps, without checkpoints and without a process's first, compiling step."""

    seconds: float
    steps: int
    _since: tuple[float, int] | None = None

    def start(self, step: int) -> None:
        self._since = time.perf_counter(), step

    def stop(self, step: int) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since[0]
            self.steps += step - self._since[1]
        self._since = None


def _train(record: Record, run: QueuedRun, seed: int, identity: dict[str, Any]) -> dict[str, Any]:
    """Train from the newest checkpoint to the last step; save a checkpoint before `TimeIsUp`."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    trainable = make_trainable(run.model, run.optimizer, run.steps, mesh, seed)
    step, corpus = make_train_step(trainable), run.tokens()
    folder = _folder(record, run, seed)
    every = max(1, run.steps // POINTS)
    with Checkpointer(folder, save_interval=1, keep=1) as checkpoints:
        state, meta = _first(checkpoints, trainable, identity)
        losses, clock = meta["losses"], _Clock(meta["seconds"], meta["timed_steps"])
        begin, saved = int(state.step), time.perf_counter()
        pending: list[tuple[int, jax.Array]] = []

        def save() -> None:
            done = int(state.step)
            clock.stop(done)
            losses.extend([number, float(loss)] for number, loss in pending)
            pending.clear()
            timed = {"seconds": clock.seconds, "timed_steps": clock.steps}
            kept = {"losses": losses, "run": identity, **timed}
            checkpoints.save(done, state.variables, state.rest, kept, force=True)
            clock.start(done)

        for number in range(begin, run.steps):
            rows = batch_of(corpus, run, seed, number)
            state, metrics = step(state, place(rows, mesh))
            if number % every == 0 or number + 1 == run.steps:
                pending.append((number + 1, metrics["loss"]))
            if number == begin:  # which compiles
                clock.start(int(state.step))
            elif number % 8 == 0:
                jax.block_until_ready(metrics["loss"])  # the clock follows the device
            now = time.perf_counter()
            if record.seconds_left <= 0 and number + 1 < run.steps:
                save()
                raise TimeIsUp
            if now - saved > SAVE_SECONDS:
                save()
                saved = now
        save()
    held_out = held_out_loss(trainable, state, corpus, run)
    chip, rate = chip_of(jax.devices()[0].device_kind), None
    if clock.seconds:
        rate = run.batch_size * clock.steps / clock.seconds
    return {
        "run": identity,
        "parameters": run.model.num_params(),
        "tokens": run.steps * run.batch_size * run.seq_len,
        "train_seconds": clock.seconds,
        "timed_steps": clock.steps,
        "tokens_per_second": rate and rate * run.seq_len,
        "mfu": rate and chip and 3 * rate * run.model.forward_flops(run.seq_len) / chip.flops,
        "held_out_nats" if run.model.causal else "held_out_nats_parallel": held_out,
        "losses": losses,
    }


def _first(
    checkpoints: Checkpointer, trainable: Trainable, identity: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Return state and metadata of the newest checkpoint, or initial ones without a checkpoint."""
    if checkpoints.latest_step() is None:
        return trainable.init(), {"losses": [], "seconds": 0.0, "timed_steps": 0}
    abstract = trainable.abstract
    _, variables, rest, meta = checkpoints.restore(abstract.variables, abstract.rest)
    if meta["run"] != identity:
        raise ValueError("its checkpoint is of other settings: give the changed run another name")
    return rest.with_variables(variables), meta


def batch_of(corpus: np.ndarray, run: QueuedRun, seed: int, number: int) -> np.ndarray:
    """Sample the rows `[B, seq_len + 1]` int32 of step `number`, outside of the held-out rows."""
    end = len(corpus) - run.held_out * run.seq_len - run.seq_len - 1
    starts = np.random.default_rng([seed, number]).integers(0, end, run.batch_size)
    return np.stack([corpus[start : start + run.seq_len + 1] for start in starts]).astype(np.int32)


def held_out_loss(
    trainable: Trainable, state: TrainState, corpus: np.ndarray, run: QueuedRun
) -> float:
    """Compute the mean teacher-forced loss of the held-out rows, in nats per token."""

    @jax.jit
    def score(variables: Any, rows: jax.Array) -> jax.Array:
        return trainable.model(variables).token_losses(rows)[0].sum(axis=1)

    total, rows = 0.0, run.held_out
    first = len(corpus) - rows * run.seq_len - 1
    starts = first + run.seq_len * np.arange(rows)
    for index in range(0, rows, run.batch_size):
        part = starts[np.minimum(index + np.arange(run.batch_size), rows - 1)]  # whole batches
        texts = np.stack([corpus[s : s + run.seq_len + 1] for s in part]).astype(np.int32)
        nats = np.asarray(score(state.variables, place(texts, trainable.mesh)))
        total += float(nats[: rows - index].sum(dtype=np.float64))
    return total / (rows * run.seq_len)
