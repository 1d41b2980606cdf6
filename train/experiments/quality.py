"""Compare the held-out loss of variants of one decoder, with and without forks, over several seeds.

python -m train.experiments.quality --task lookup --variants plain copy2 topk --out lookup.jsonl
python -m train.experiments.quality --report lookup.jsonl

For a given seed, all variants read the same tokens in the same order. The fork layers of forking
variants add up to 0.8 % of parameters. Each finished run (task, steps, variant and seed) is one
line of the file; a second call trains only the missing runs.
"""

import dataclasses
import math
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
from thoughtbubbles.module import abstract_module
from thoughtbubbles.statistics import readable as fork_metrics
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data import DataConfig, TrainReader, prepare
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, make_trainable
from train.engine.step import make_train_step
from train.evaluation.held_out import Evaluator
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    check_names,
    markdown_table,
    mean_text,
    run_study,
    seeds_text,
)
from train.experiments.tasks import Lookup

FORK_LAYERS, RATIO = (1, 2), 2.0
KEY = ("task", "steps", "variant", "seed")


@dataclasses.dataclass(frozen=True)
class RandomForks:
    """Control policy of random forks: `PrefixRank` with fixed random numbers in place of scores.

    Each candidate slot has its own random number, which is the same in all rows but differs between
    fork layers with different numbers of candidates. Rows begin anywhere in a text, so that a slot
    is independent of its token: which tokens fork is unrelated to the content of the tokens.

    Attributes:
        ratio: Maximum number of streams per token.
    """

    ratio: float

    @property
    def causal(self) -> bool:
        return True

    def capacity(self, num_tokens: int) -> int:
        return PrefixRank(self.ratio).capacity(num_tokens)

    def keep(self, candidates: Candidates) -> jax.Array:
        count = candidates.log_score.shape[1]
        keys = jax.random.normal(jax.random.key(count), (count,))  # differs between fork layers
        keys = jnp.broadcast_to(keys, candidates.log_score.shape)
        return PrefixRank(self.ratio).keep(dataclasses.replace(candidates, log_score=keys))


def _with(**changes) -> Callable[[ModelConfig], ModelConfig]:
    return lambda base: dataclasses.replace(base, **changes)


def _forking(policy, **changes) -> Callable[[ModelConfig], ModelConfig]:
    return _with(fork_layers=FORK_LAYERS, policy=policy, **changes)


# Mapping from a variant to a function from the plain decoder's config to the variant's config.
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
    """Task of predicting the bytes of the Python standard library's source.

    Args:
        rows: Number of held-out rows to score, from held-out documents.
        positions: Number of targets scored prefix-only if a policy is not causal; 0 scores all.
    """

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
    """Decoder for rows of `Lookup`, in which each id packs an input token and an answer together.

    The decoder's input is the tokens without the answers. Only answers are scored: targets without
    an answer have log-probability 0.
    """

    def run(self, tokens: jax.Array, length: jax.Array | None = None, **training: Any) -> Output:
        return super().run(tokens % self.config.vocab_size, length, **training)

    def log_prob(self, streams: Streams, targets: jax.Array) -> jax.Array:
        answer = targets // self.config.vocab_size - 1
        return jnp.where(answer >= 0, super().log_prob(streams, jnp.maximum(answer, 0)), 0)


class LookupTask:
    """The task `tasks.Lookup` for a narrow decoder whose single head can attend to one offset.

    Args:
        rows: Number of held-out rows to score.
        positions: Number of answers scored prefix-only if a policy is not causal; 0 scores all.
    """

    task = Lookup()
    base = ModelConfig(vocab_size=task.vocab_size, embed_dim=32, num_layers=3, num_heads=1)
    steps, batch_size, seq_len = 600, 32, task.seq_len
    optimizer = OptimizerConfig(learning_rate=3e-3)

    def __init__(self, rows: int, positions: int):
        self._rows = self.task.rows(np.random.default_rng([0, 1]), rows)
        self._positions = positions

    def trainable(self, config: ModelConfig, steps: int, seed: int) -> Trainable:
        trainable = make_trainable(config, self.optimizer, steps, make_mesh(MeshConfig()), seed)
        constrain = trainable.model(trainable.abstract.variables).constrain
        model = abstract_module(lambda: AnswerModel(config, rngs=nnx.Rngs(0), constrain=constrain))
        return dataclasses.replace(trainable, graphdef=nnx.graphdef(model))

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([seed, 0])
        while True:
            yield self.task.rows(rng, self.batch_size)

    def evaluate(self, trainable: Trainable, params: Any) -> dict[str, float]:
        """Compute the held-out loss of answers, also prefix-only if the policy is not causal.

        Args:
            trainable: Structure of the model.
            params: State of the model's parameters (`TrainState.variables`).

        Returns:
            `loss`, nats per answer of the autoregressive model, and its `standard_error`. If the
            policy is not causal, `loss` is the teacher-forced mean plus the mean difference between
            prefix-only and teacher-forced nats of the sampled answers, and `blockwise_loss` is the
            teacher-forced mean.
        """
        rows, size = self._rows, 64
        parallel = jax.jit(lambda params, rows: trainable.model(params).token_losses(rows)[0])
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        nats = np.concatenate([np.asarray(parallel(params, part)) for part in parts])
        is_question = self.task.is_question(rows)
        loss = float(nats[is_question].mean())
        spread = np.where(is_question, nats - loss, 0).sum(axis=1)
        error = float(spread.std(ddof=1) * math.sqrt(len(rows)) / is_question.sum())
        if trainable.config.causal:
            return {"loss": loss, "standard_error": error}
        row, at = np.nonzero(is_question)
        chosen = np.random.default_rng(0).permutation(len(row))[: self._positions or None]
        row, at = row[chosen], at[chosen]
        gaps = self._prefix_only(trainable, params, row, at) - nats[row, at]
        return {
            "loss": loss + float(gaps.mean()),
            "standard_error": math.hypot(error, gaps.std(ddof=1) / math.sqrt(len(gaps))),
            "blockwise_loss": loss,
        }

    def _prefix_only(self, trainable, params, row, at) -> np.ndarray:
        """Compute nats `[N]` of the answers to `N` questions, with only prefixes as input.

        Args:
            trainable: Structure of the model.
            params: State of the model's parameters (`TrainState.variables`).
            row: Index of the held-out row of each question `[N]`.
            at: Position of each question in its row `[N]`, the last token of its prefix.
        """

        @jax.jit
        def score(params, tokens, length, answer):
            model = trainable.model(params)
            streams = model.run(tokens, length).streams
            log_probs = jax.nn.log_softmax(model.logits_at(streams, length - 1), axis=-1)
            return -jnp.take_along_axis(log_probs, answer[:, None], axis=1)[:, 0]

        answer = self._rows[row, at + 1] // self.task.vocab_size - 1
        position = np.arange(self.seq_len)
        tokens = np.where(position <= at[:, None], self._rows[row, :-1], 0)
        parts = [slice(start, start + 64) for start in range(0, len(row), 64)]
        return np.concatenate(
            [np.asarray(score(params, tokens[p], at[p] + 1, answer[p])) for p in parts]
        )


TASKS = {"stdlib": Stdlib, "lookup": LookupTask}


@dataclasses.dataclass(frozen=True)
class Quality(StudyConfig):
    """Trains variants of one decoder on one task, or reports stored results.

    Attributes:
        task: Task, "stdlib" (bytes of source text) or "lookup" (`train.experiments.tasks`).
        variants: Variants to train. Variants that are not in the default are prefix_rank_noise,
            topk_unscored, prefix_rank_scored, threshold_scored and threshold_ungated.
        steps: Number of training steps; 0 stands for the task's default, 2500 for "stdlib" and 600
            for "lookup".
        rows: Number of held-out rows, the same rows for all variants.
        positions: Number of targets that are scored prefix-only if the policy is not causal.
        against: Baseline variant, whose loss with the same seed the table subtracts from each loss.
    """

    task: Literal["stdlib", "lookup"] = "lookup"
    variants: tuple[str, ...] = ("plain", "copy2", "topk", "prefix_rank", "threshold", "random")
    steps: int = 0
    rows: int = 1024
    positions: int = 2048
    out: str = "quality.jsonl"
    against: str = "plain"

    def __post_init__(self):
        super().__post_init__()
        check_names("variant", (*self.variants, self.against), VARIANTS)


def main(config: Quality) -> None:
    """Train the variants that the file of results lacks, or print the tables."""
    settings = "rows", "positions"
    run_study(config, KEY, train_missing, lambda results: report(results, config.against), settings)


def train_missing(config: Quality, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    Raises:
        ValueError: `results` has results with another number of held-out rows or positions.
    """
    task = TASKS[config.task](config.rows, config.positions)
    steps = config.steps or task.steps
    for result in results.found:
        scored = result["rows"], result["positions"]
        if scored != (config.rows, config.positions):
            raise ValueError(
                f"{config.out} holds results over rows, positions = {scored}, now "
                f"{(config.rows, config.positions)}: pass another --out, or the same numbers"
            )
    runs = results.missing(
        {"task": config.task, "variant": variant, "seed": seed, "steps": steps}
        for seed in config.seeds
        for variant in config.variants
    )
    for run in runs:
        result = run | {"rows": config.rows, "positions": config.positions}
        model = VARIANTS[run["variant"]](task.base)
        result |= train_and_score(task, model, steps, run["seed"])
        yield (
            result,
            (
                f"{run['variant']} seed {run['seed']}: {result['loss']:.4f} ± "
                f"{result['standard_error']:.4f} nats, {result['seconds']:.0f} s"
            ),
        )


def train_and_score(task: Stdlib | LookupTask, model: ModelConfig, steps: int, seed: int) -> Result:
    """Train a model from random initial parameters, and score the trained model.

    Args:
        task: Task, with its data and optimizer.
        model: Config of the model.
        steps: Number of training steps, 1 or more.
        seed: Seed of parameters and training rows.

    Returns:
        Entries of a result: the numbers of training `tokens` and of `parameters`; the held-out
        scores of `task.evaluate`; metrics of each fork layer in the last training batch
        (`fork_L/streams_per_token`, `fork_L/forked_share`, and `fork_L/threshold` if tracked);
        `step_ms`, the mean time of a step in ms, without the first step; `seconds`, the time of the
        whole run with compilation and scoring; and the version of `jax`.
    """
    trainable = task.trainable(model, steps, seed)
    step, state = make_train_step(trainable), trainable.init()
    batches = task.batches(seed)
    clock = after_first = Clock()
    metrics: dict[str, Any] = {}
    for number in range(steps):
        state, metrics = step(state, place(next(batches), trainable.mesh))
        if number == 0:
            jax.block_until_ready(metrics["loss"])
            after_first = Clock()
    jax.block_until_ready(state.params)
    seconds = after_first.read().seconds
    scores = task.evaluate(trainable, state.variables)
    forks = fork_metrics(jax.device_get(metrics["aux"]), model.fork_layers)
    return {
        "tokens": steps * task.batch_size * task.seq_len,
        "parameters": model.num_params(),
        **scores,
        **{name: value for name, value in forks.items() if not name.endswith("histogram")},
        "step_ms": 1e3 * seconds / max(steps - 1, 1),
        "seconds": clock.read().seconds,
        "jax": jax.__version__,
    }


def report(results: list[Result], against: str = "plain") -> str:
    """Format Markdown tables of variants, one for each task and number of steps.

    Losses are means over seeds ± standard errors. Streams per token are means over seeds. If the
    results have a held-out number of streams per token, the column shows this number first; then it
    shows the number after each fork layer in the last training batch. The time of a step is the
    median over seeds.

    Args:
        results: Finished runs. If a run has several results, only the last result is used.
        against: Baseline variant. One column shows the mean over seeds of a variant's loss minus
            the baseline's loss with the same seed; seeds without a baseline run are left out.
    """
    latest = {tuple(result[name] for name in KEY): result for result in results}.values()
    lines = []
    for (task, steps), runs in by_key(latest, "task", "steps").items():
        lines += [
            f"{task}, {steps:,} steps, {runs[0]['tokens']:,} tokens; held-out nats per target, "
            "prefix-only",
            "",
        ]
        losses = {(run["variant"], run["seed"]): run["loss"] for run in runs}
        rows = []
        for (variant,), of_variant in by_key(runs, "variant").items():
            paired = [
                run["loss"] - losses[against, run["seed"]]
                for run in of_variant
                if (against, run["seed"]) in losses
            ]
            streams = [
                f"{np.mean([run[name] for run in of_variant]):.2f}"
                for name in of_variant[0]
                if name.endswith("streams_per_token")
            ]
            rows.append(
                (
                    variant,
                    f"{of_variant[0]['parameters']:,}",
                    seeds_text(sorted(of_variant, key=lambda run: run["seed"])),
                    mean_text([run["loss"] for run in of_variant], 4),
                    mean_text(paired, 4, "+") if variant != against else "",
                    mean_text(
                        [r["blockwise_loss"] for r in of_variant if "blockwise_loss" in r], 4
                    ),
                    ", ".join(streams),
                    f"{np.median([run['step_ms'] for run in of_variant]):.0f}",
                )
            )
        head = ("variant", "parameters", "seeds", "loss", f"minus {against}", "parallel")
        lines += [*markdown_table((*head, "streams", "step ms"), rows), ""]
    return "\n".join(lines)


def command() -> None:
    run_command(main, Quality)


if __name__ == "__main__":
    command()
