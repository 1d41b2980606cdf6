"""Do forks earn their streams? Several seeds of each variant, same parameters and same tokens.

python -m train.experiments.quality --task lookup --variants plain copy2 topk --out lookup.jsonl
python -m train.experiments.quality --report lookup.jsonl

Each finished (variant, seed) is one line of the file; starting again does what is missing.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles import (
    Candidates,
    ModelConfig,
    Output,
    PrefixRank,
    Streams,
    Thoughtbubbles,
    Threshold,
    TopK,
)
from thoughtbubbles.statistics import readable as fork_metrics
from train.cli.command import run_command
from train.data import DataConfig, TrainReader, prepare
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, make_trainable
from train.engine.step import make_train_step
from train.evaluation.held_out import Evaluator
from train.experiments.results import Results, read_results
from train.experiments.tasks import Lookup

FORK_LAYERS, RATIO = (1, 2), 2.0
KEY = ("task", "steps", "variant", "seed")


@dataclasses.dataclass(frozen=True)
class RandomForks:
    """Control: `PrefixRank` over random keys, drawn once for each candidate place of a row.

    Where in a text a row begins is arbitrary, so a place says nothing of the token that stands
    there: what forks is unrelated to what it is.
    """

    ratio: float

    @property
    def causal(self) -> bool:
        return True

    def capacity(self, num_tokens: int) -> int:
        return PrefixRank(self.ratio).capacity(num_tokens)

    def keep(self, candidates: Candidates) -> jax.Array:
        count = candidates.log_score.shape[1]
        keys = jax.random.normal(jax.random.key(count), (count,))  # others at each fork layer
        keys = jnp.broadcast_to(keys, candidates.log_score.shape)
        return PrefixRank(self.ratio).keep(dataclasses.replace(candidates, log_score=keys))


def _with(**changes) -> Callable[[ModelConfig], ModelConfig]:
    return lambda base: dataclasses.replace(base, **changes)


def _forking(policy, **changes) -> Callable[[ModelConfig], ModelConfig]:
    return _with(fork_layers=FORK_LAYERS, policy=policy, **changes)


# A variant turns the plain base into what is compared.
VARIANTS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "plain": lambda base: base,
    "copy2": _with(copies=2, merge="rightmost"),
    "topk": _forking(TopK(RATIO), score_originals=True),
    "prefix_rank": _forking(PrefixRank(RATIO)),
    "prefix_rank_noise": _forking(PrefixRank(RATIO, noise=1.0)),
    "threshold": _forking(Threshold(RATIO)),
    "random": _forking(RandomForks(RATIO)),
    "topk_unscored": _forking(TopK(RATIO)),
    "prefix_rank_scored": _forking(PrefixRank(RATIO), score_originals=True),
    "threshold_scored": _forking(Threshold(RATIO), score_originals=True),
    "threshold_ungated": _forking(Threshold(RATIO, gate=False)),
}


class Stdlib:
    """Bytes of the Python standard library's source; held-out documents."""

    base = ModelConfig(vocab_size=320, embed_dim=128, num_layers=3, num_heads=2, mlp_dim=256)
    steps, batch_size, seq_len = 2500, 32, 64
    optimizer = OptimizerConfig(learning_rate=3e-3)

    def __init__(self, rows: int, positions: int):
        self._data = prepare(DataConfig(seq_len=self.seq_len))
        self._evaluation = EvalConfig(rows=rows, positions=positions)

    def trainable(self, config: ModelConfig, steps: int, seed: int) -> Trainable:
        return make_trainable(config, self.optimizer, steps, make_mesh(MeshConfig()), seed)

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        for batch in TrainReader(self._data.train, self.batch_size, seed).iterate():
            yield batch["tokens"]

    def evaluate(self, trainable: Trainable, params: Any) -> dict[str, float]:
        return Evaluator(trainable, 64, self._evaluation)(params, self._data.validation)


class AnswerModel(Thoughtbubbles):
    """Reads the packed rows of `Lookup`: only answers are scored, and they are never input."""

    def run(self, tokens: jax.Array, length: jax.Array | None = None, **training: Any) -> Output:
        return super().run(tokens % self.config.vocab_size, length, **training)

    def log_prob(self, streams: Streams, targets: jax.Array) -> jax.Array:
        answer = targets // self.config.vocab_size - 1
        return jnp.where(answer >= 0, super().log_prob(streams, jnp.maximum(answer, 0)), 0)


class LookupTask:
    """`tasks.Lookup` for a narrow model with one head: a token looks back in one way a layer."""

    task = Lookup()
    base = ModelConfig(vocab_size=task.vocab_size, embed_dim=32, num_layers=3, num_heads=1)
    steps, batch_size, seq_len = 600, 32, task.seq_len
    optimizer = OptimizerConfig(learning_rate=3e-3)

    def __init__(self, rows: int, positions: int):
        self._rows = self.task.rows(np.random.default_rng([0, 1]), rows)
        self._positions = positions

    def trainable(self, config: ModelConfig, steps: int, seed: int) -> Trainable:
        trainable = make_trainable(config, self.optimizer, steps, make_mesh(MeshConfig()), seed)
        constrain = trainable.model(trainable.abstract.weights).constrain
        model = nnx.eval_shape(lambda: AnswerModel(config, rngs=nnx.Rngs(0), constrain=constrain))
        return dataclasses.replace(trainable, graphdef=nnx.graphdef(model))

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([seed, 0])
        while True:
            yield self.task.rows(rng, self.batch_size)

    def evaluate(self, trainable: Trainable, params: Any) -> dict[str, float]:
        """Nats per answer, as `Evaluator` does: prefix-only where the policy is not causal."""
        rows, size = self._rows, 64
        blockwise = jax.jit(lambda params, rows: trainable.model(params).token_losses(rows)[0])
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        nats = np.concatenate([np.asarray(blockwise(params, part)) for part in parts])
        asked = self.task.asked(rows)
        loss = float(nats[asked].mean())
        spread = np.where(asked, nats - loss, 0).sum(axis=1)
        error = float(spread.std(ddof=1) * math.sqrt(len(rows)) / asked.sum())
        if trainable.config.causal:
            return {"loss": loss, "standard_error": error}
        row, at = np.nonzero(asked)
        chosen = np.random.default_rng(0).permutation(len(row))[: self._positions or None]
        row, at = row[chosen], at[chosen]
        gaps = self._prefix_only(trainable, params, row, at) - nats[row, at]
        return {
            "loss": loss + float(gaps.mean()),
            "standard_error": math.hypot(error, gaps.std(ddof=1) / math.sqrt(len(gaps))),
            "blockwise_loss": loss,
        }

    def _prefix_only(self, trainable, params, row, at) -> np.ndarray:
        """Nats of the answer at place `at` of each row, computed from the tokens up to it alone."""

        @jax.jit
        def score(params, tokens, length, answer):
            model = trainable.model(params)
            streams = model.run(tokens, length).streams
            log_probs = jax.nn.log_softmax(model.logits_at(streams, length - 1), axis=-1)
            return -jnp.take_along_axis(log_probs, answer[:, None], axis=1)[:, 0]

        answer = self._rows[row, at + 1] // self.task.vocab_size - 1
        places = np.arange(self.seq_len)
        tokens = np.where(places <= at[:, None], self._rows[row, :-1], 0)
        parts = [slice(start, start + 64) for start in range(0, len(row), 64)]
        return np.concatenate(
            [np.asarray(score(params, tokens[p], at[p] + 1, answer[p])) for p in parts]
        )


TASKS = {"stdlib": Stdlib, "lookup": LookupTask}


@dataclasses.dataclass(frozen=True)
class Quality:
    """Train variants of one decoder on one task, or report what was trained.

    Attributes:
        task: `stdlib` (bytes of source text) or `lookup` (`train.experiments.tasks`).
        variants: names from `VARIANTS`.
        seeds: of initial parameters and data order.
        steps: of training (0: the task's own number).
        rows: held-out rows, the same for all variants.
        positions: how many targets are scored prefix-only if the policy is not causal.
        out: where results are appended, one JSON object a line.
        report: a file of results to print as a table, in place of training.
        against: variant that the table compares the others with, seed by seed.
    """

    task: Literal["stdlib", "lookup"] = "lookup"
    variants: tuple[str, ...] = ("plain", "copy2", "topk", "prefix_rank", "threshold", "random")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 0
    rows: int = 1024
    positions: int = 2048
    out: str = "quality.jsonl"
    report: str | None = None
    against: str = "plain"

    def __post_init__(self):
        for name in (*self.variants, self.against):
            if name not in VARIANTS:
                raise ValueError(f"unknown variant {name!r}: choose from {', '.join(VARIANTS)}")


def main(config: Quality) -> None:
    """Train what is missing, or print the table."""
    if config.report is not None:
        print(report(read_results(config.report), config.against))
        return
    task = TASKS[config.task](config.rows, config.positions)
    steps = config.steps or task.steps
    results = Results(config.out, KEY)
    for result in results.found:
        scored = result["rows"], result["positions"]
        if scored != (config.rows, config.positions):
            raise ValueError(
                f"{config.out} holds results over rows, positions = {scored}, asked for "
                f"{(config.rows, config.positions)}: pass another --out, or the same numbers"
            )
    for seed in config.seeds:
        for variant in config.variants:
            result = {"task": config.task, "variant": variant, "seed": seed, "steps": steps}
            if result in results:
                continue
            result |= {"rows": config.rows, "positions": config.positions}
            result |= train_and_score(task, VARIANTS[variant](task.base), steps, seed)
            results.add(result)
            print(f"{variant} seed {seed}: {result['loss']:.4f} ± {result['standard_error']:.4f} "
                  f"nats, {result['seconds']:.0f} s", flush=True)  # fmt: skip


def train_and_score(
    task: Stdlib | LookupTask, model: ModelConfig, steps: int, seed: int
) -> dict[str, Any]:
    """One run from scratch: held-out loss and what it cost."""
    trainable = task.trainable(model, steps, seed)
    step, state = make_train_step(trainable), trainable.init()
    batches = task.batches(seed)
    begin = first = time.perf_counter()
    metrics: dict[str, Any] = {}
    for number in range(steps):
        state, metrics = step(state, place(next(batches), trainable.mesh))
        if number == 0:
            jax.block_until_ready(metrics["loss"])
            first = time.perf_counter()
    jax.block_until_ready(state.params)
    trained = time.perf_counter()
    scores = task.evaluate(trainable, state.weights)
    forks = fork_metrics(jax.device_get(metrics["aux"]), model.fork_layers)
    return {
        "tokens": steps * task.batch_size * task.seq_len,
        "parameters": model.num_params(),
        **scores,
        **{name: value for name, value in forks.items() if not name.endswith("histogram")},
        "step_ms": 1e3 * (trained - first) / max(steps - 1, 1),
        "seconds": time.perf_counter() - begin,
        "jax": jax.__version__,
    }


def report(results: list[dict[str, Any]], against: str = "plain") -> str:
    """Markdown tables, one for each task and number of steps.

    Means over seeds ± standard error of that mean; differences are paired by seed.
    """
    by_run = {tuple(result[name] for name in KEY): result for result in results}
    lines = []
    for task, steps in dict.fromkeys(key[:2] for key in by_run):
        runs = {key[2:]: result for key, result in by_run.items() if key[:2] == (task, steps)}
        tokens = next(iter(runs.values()))["tokens"]
        lines += [
            f"{task}, {steps:,} steps, {tokens:,} tokens; held-out nats per target, prefix-only",
            "",
            f"| variant | parameters | seeds | loss | minus {against} | blockwise | streams "
            "| step ms |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for variant in dict.fromkeys(variant for variant, _ in runs):
            mine = {seed: result for (name, seed), result in runs.items() if name == variant}
            paired = [
                mine[s]["loss"] - runs[against, s]["loss"] for s in mine if (against, s) in runs
            ]
            blockwise = [run["blockwise_loss"] for run in mine.values() if "blockwise_loss" in run]
            any_run = next(iter(mine.values()))
            streams = [
                f"{np.mean([run[name] for run in mine.values()]):.2f}"
                for name in any_run
                if name.endswith("streams_per_token")
            ]
            cells = [
                variant,
                f"{any_run['parameters']:,}",
                " ".join(str(seed) for seed in sorted(mine)),
                _mean([run["loss"] for run in mine.values()]),
                _mean(paired, "+") if variant != against else "",
                _mean(blockwise),
                ", ".join(streams),
                f"{np.median([run['step_ms'] for run in mine.values()]):.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _mean(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):{sign}.4f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.4f}"


def command() -> None:
    run_command(main, Quality)


if __name__ == "__main__":
    command()
