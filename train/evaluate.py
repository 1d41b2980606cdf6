"""Held-out loss that tells the truth: prefix-only for models whose policy is not causal.

Of a trained run, also under other dials: python -m train.evaluate --checkpoint runs/tiny
Scores of tasks, of pretrained models too: python -m train.evaluate --model smollm2 --tasks a.jsonl
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles import Thoughtbubbles
from train.cli.command import run_command
from train.cli.figures import check_figure
from train.config import EvalConfig
from train.data import DataConfig, PackedRows, evaluation_batches, prepare
from train.devices.mesh import (
    MeshConfig,
    batch_sharding,
    check_batch,
    make_mesh,
    place,
    replicated,
)
from train.engine.losses import token_losses
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, make_trainable
from train.evaluation.policy_overrides import AnyPolicy, Setting, figure, table, turn
from train.evaluation.scoring import Scorer
from train.evaluation.task_files import read_task
from train.evaluation.task_scores import (
    answers,
    check_output,
    summary,
    task_table,
    write_records,
    write_results,
)
from train.models.load import Loaded, Writer, check_named, load_model, load_named


class Evaluator:
    """Scores packed rows with a model's parameters; compiles its functions once.

    A blockwise pass scores all positions of a row at once. For a policy that looks at the whole row
    (`TopK`) that is not the loss of an autoregressive model, so each scored position is computed
    again with only its prefix as input.

    Args:
        trainable: the model and its mesh.
        batch_size: rows per pass.
        config: how much to score.
    """

    def __init__(self, trainable: Trainable, batch_size: int, config: EvalConfig):
        self._mesh, self._config = trainable.mesh, config
        self._causal = trainable.config.causal
        self._batch_size = batch_size
        shardings = (trainable.shardings.weights, batch_sharding(self._mesh))
        everywhere = replicated(self._mesh)

        def blockwise(weights: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Nats `[N, T]` and live streams `[N]` of rows."""
            nats, output = token_losses(trainable.model(weights), tokens)
            return nats, output.streams.alive.sum(axis=1)

        def prefix_only(weights: Any, prefixes: jax.Array) -> jax.Array:
            """`[N]` nats of each row's last token (-1 stands after it) given those before."""
            model = trainable.model(weights)
            length = (prefixes >= 0).sum(axis=1, dtype=jnp.int32) - 1
            target = jnp.take_along_axis(prefixes, length[:, None], axis=1)
            streams = model.run(jnp.maximum(prefixes[:, :-1], 0), length).streams
            log_probs = jax.nn.log_softmax(model.logits_at(streams, length - 1), axis=-1)
            return -jnp.take_along_axis(log_probs, target, axis=1)[:, 0]

        self._blockwise = jax.jit(blockwise, in_shardings=shardings, out_shardings=everywhere)
        self._prefix_only = jax.jit(prefix_only, in_shardings=shardings, out_shardings=everywhere)

    def __call__(self, weights: Any, rows: PackedRows) -> dict[str, float]:
        """Metrics of rows spread over the split.

        `loss` (nats per token) and `bits_per_byte` are the autoregressive model's;
        `standard_error` is that of `loss` for the whole split, from having scored some rows only;
        `streams_per_token` is the mean after the last block, of the blockwise pass.

        For a policy that is not causal `blockwise_loss` and `blockwise_bits_per_byte` stand beside
        them. The loss is then the blockwise mean over all positions plus the mean difference
        between prefix-only and blockwise over the sampled positions, and the standard error
        includes the error of that difference.

        Args:
            weights: `TrainState.weights`.
        """
        tokens, nats, num_streams, num_bytes = self._score_blockwise(weights, rows)
        weight = tokens[:, 1:] >= 0
        total, count = float(nats[weight].sum()), int(weight.sum())
        to_bits = count / math.log(2) / max(num_bytes, 1)
        blockwise = total / count
        error = _error_of_mean(nats, weight, len(rows))
        streams_per_token = num_streams / int((tokens[:, :-1] >= 0).sum())
        if self._causal:
            return {
                "loss": blockwise,
                "bits_per_byte": blockwise * to_bits,
                "standard_error": error,
                "streams_per_token": streams_per_token,
            }
        row, place_in_row = np.nonzero(weight)
        chosen = self._choose(len(row))
        row, place_in_row = row[chosen], place_in_row[chosen]
        gaps = self._score_prefixes(weights, tokens, row, place_in_row) - nats[row, place_in_row]
        gap_error = gaps.std(ddof=1) / math.sqrt(len(gaps)) if len(gaps) < count else 0.0
        loss = blockwise + float(gaps.mean())
        return {
            "loss": loss,
            "bits_per_byte": loss * to_bits,
            "standard_error": math.hypot(error, gap_error),
            "streams_per_token": streams_per_token,
            "blockwise_loss": blockwise,
            "blockwise_bits_per_byte": blockwise * to_bits,
        }

    def _score_blockwise(self, weights: Any, rows: PackedRows):
        tokens, nats, num_streams, num_bytes = [], [], 0, 0
        limit = self._config.rows or None
        for batch in evaluation_batches(rows, self._batch_size, limit):
            scored = self._blockwise(weights, place(batch["tokens"], self._mesh))
            tokens.append(batch["tokens"])
            nats.append(np.asarray(scored[0]))
            num_streams += int(np.asarray(scored[1]).sum())
            num_bytes += int(batch["bytes"].sum())
        return np.concatenate(tokens), np.concatenate(nats), num_streams, num_bytes

    def _choose(self, count: int) -> np.ndarray:
        wanted = self._config.positions
        if not 0 < wanted < count:
            return np.arange(count)
        return np.sort(np.random.default_rng(0).choice(count, wanted, replace=False))

    def _score_prefixes(self, weights, tokens, row, place_in_row) -> np.ndarray:
        """Nats of target `place_in_row` of each row, computed from the tokens up to it alone."""
        scores = []
        for start in range(0, len(row), self._batch_size):
            part = slice(start, start + self._batch_size)
            prefixes = np.full((self._batch_size, tokens.shape[1]), -1, np.int32)
            prefixes[:, :2] = 0  # filler rows are two tokens long
            ends = place_in_row[part] + 1
            for index, (source, end) in enumerate(zip(row[part], ends, strict=True)):
                prefixes[index] = -1
                prefixes[index, : end + 1] = tokens[source, : end + 1]
            scored = np.asarray(self._prefix_only(weights, place(prefixes, self._mesh)))
            scores.append(scored[: len(ends)])
        return np.concatenate(scores)


def _error_of_mean(nats: np.ndarray, weight: np.ndarray, rows_in_split: int) -> float:
    """Standard error of the mean over targets, rows being the units that were sampled."""
    scored = weight.any(axis=1)
    total, count = (nats * weight).sum(axis=1)[scored], weight.sum(axis=1)[scored]
    number = len(count)
    if number < 2 or number >= rows_in_split:
        return 0.0
    spread = total - count * (total.sum() / count.sum())
    variance = np.square(spread).sum() * number / (number - 1)
    return float(np.sqrt(variance * (1 - number / rows_in_split)) / count.sum())


def readable(metrics: dict[str, float]) -> str:
    """One line for a person."""
    line = (
        f"held-out loss {metrics['loss']:.4f} ± {metrics['standard_error']:.4f} nats/token, "
        f"{metrics['bits_per_byte']:.4f} bits/byte, "
        f"{metrics['streams_per_token']:.2f} streams/token"
    )
    if "blockwise_loss" not in metrics:
        return line
    return f"{line} (prefix-only); blockwise {metrics['blockwise_loss']:.4f}, not causal"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out loss of a trained run, also under another policy or dial than it was trained with;
    or scores of tasks, of a run or of a pretrained model.

    Attributes:
        checkpoint: run folder, or one step's folder in it.
        model: in place of a checkpoint, "smollm2", a Hugging Face folder, or a .gguf file.
        policy: in place of the model's own, e.g. "PrefixRank(ratio=2.0)".
        ratio, window, threshold_offset: change this in the policy.
        sweep: several ratios, one after the other.
        sweep_offset: several threshold offsets, one after the other.
        figure: save the sweep's bits per byte against streams per token here (needs matplotlib).
        rows: validation rows scored, spread over the split (0: all).
        positions: how many are scored prefix-only if the policy is not causal (0: all).
        batch_size: rows per pass.
        tasks: in place of held-out rows, JSONL files of multiple-choice or cloze items: HellaSwag,
            PIQA, BLiMP, LAMBADA, or query, choices and gold; name=FILE names one.
        limit: score this many items of each task only, the first.
        json: save the scores of tasks here.
        records: save the scores of every item here, one JSON object on each line.
    """

    checkpoint: str | None = None
    model: str | None = None
    policy: AnyPolicy | None = None
    ratio: float | None = None
    window: int | None = None
    threshold_offset: float | None = None
    sweep: tuple[float, ...] = ()
    sweep_offset: tuple[float, ...] = ()
    figure: str | None = None
    rows: int = 256
    positions: int = 256
    batch_size: int = 16
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    json: str | None = None
    records: str | None = None

    def __post_init__(self):
        check_named(self.checkpoint, self.model)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} is below 1")
        if self.tasks:
            if self.sweep or self.sweep_offset or self.figure:
                raise ValueError("--tasks score one setting: leave out the sweep and its figure")
        elif self.model is not None:
            raise ValueError(f"{self.model} has no held-out rows of its own: pass --tasks FILE")
        else:
            for name in ("limit", "json", "records"):
                given = getattr(self, name)
                if given is not None:
                    raise ValueError(f"{name}={given} is for tasks: pass --tasks FILE too")


def main(config: EvaluateConfig) -> None:
    (score_tasks if config.tasks else score_held_out)(config)


def score_tasks(config: EvaluateConfig) -> None:
    """Print a table; everything is checked and read before the model is."""
    outputs = [Path(file) for file in (config.json, config.records) if file]
    for path in outputs:
        check_output(path)
    tasks = [read_task(spec, config.limit) for spec in config.tasks]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks are called {name}: name them, as in other={name}.jsonl")
    loaded = load_named(config.checkpoint, config.model)
    [policy] = policies(config, loaded).values()
    loaded = dataclasses.replace(loaded, model=loaded.model.with_policy(policy))
    scorer = Scorer(loaded, config.batch_size)
    if not loaded.model.config.causal:
        print(f"note: {policy} is not causal: a pass for each scored token", file=sys.stderr)
    found = answers(scorer, tasks)
    if scorer.truncated:
        print(
            f"note: {scorer.truncated} contexts lost their beginning, the model reads "
            f"{scorer.max_length} tokens at a time",
            file=sys.stderr,
        )
    summaries = {task.name: summary(task, of) for task, of in zip(tasks, found, strict=True)}
    print(task_table(summaries))
    if config.records:
        write_records(Path(config.records), tasks, found)
    if config.json:
        setting = {
            "model": config.model or config.checkpoint,
            "policy": str(policy) if loaded.model.config.fork_layers else None,
        }
        write_results(Path(config.json), {**setting, "tasks": summaries})


def score_held_out(config: EvaluateConfig) -> None:
    """Print the held-out loss of each setting of the dials."""
    if config.figure:
        if not (config.sweep or config.sweep_offset):
            raise ValueError(f"figure {config.figure} shows a sweep: add --sweep 1.0 1.5 2.0")
        check_figure(Path(config.figure))
    settings = EvalConfig(rows=config.rows, positions=config.positions)
    check_batch(config.batch_size, 1, make_mesh(MeshConfig()))
    loaded = load_model(str(config.checkpoint))
    trained = loaded.model.config.policy
    models = {name: loaded.model.with_policy(p) for name, p in policies(config, loaded).items()}
    rows = validation_rows(loaded)
    found = []
    for name, model in models.items():
        metrics = held_out(model, rows, config.batch_size, settings)
        found.append(Setting(name, model.config.policy, metrics))
        print(f"{model.config.policy}: {readable(metrics)}")
    if len(found) > 1:
        print(f"\n{table(found)}")
    if config.figure:
        title = f"{config.checkpoint}, {type(found[0].policy).__name__}"
        figure(found, title, trained).savefig(config.figure, dpi=150)
        print(f"figure: {Path(config.figure).absolute()}")


def policies(config: EvaluateConfig, loaded: Writer) -> dict[str, AnyPolicy]:
    """The policies asked for, by the name of their setting."""
    if config.sweep and config.sweep_offset:
        raise ValueError("--sweep and --sweep-offset turn two dials at once: choose one of them")
    dials = (config.policy, config.ratio, config.window, config.threshold_offset)
    turned = any(dial is not None for dial in dials) or config.sweep or config.sweep_offset
    if turned and not loaded.model.config.fork_layers:
        name = config.checkpoint or config.model
        raise ValueError(f"{name} is a plain decoder: it has no policy to change")
    policy = config.policy or loaded.model.config.policy
    policy = turn(policy, config.ratio, config.window, config.threshold_offset)
    if config.sweep:
        return {f"ratio {ratio:g}": turn(policy, ratio=ratio) for ratio in config.sweep}
    if config.sweep_offset:
        return {f"offset {o:+g}": turn(policy, threshold_offset=o) for o in config.sweep_offset}
    return {"": policy}


def validation_rows(loaded: Loaded) -> PackedRows:
    """The held-out rows of a run, from its own corpus."""
    if "weights" in loaded.config:
        raise ValueError(
            "this run was fine-tuned on chat data, its held-out loss is in metrics.jsonl: pass "
            "--tasks FILE"
        )
    data = prepare(DataConfig(**loaded.config["data"]))
    if data.fingerprint != loaded.data_fingerprint:
        raise ValueError(
            f"the run was trained on data {loaded.data_fingerprint}, the corpus is now "
            f"{data.fingerprint}: restore the corpus {loaded.config['data']['corpus']}"
        )
    return data.validation


def held_out(
    model: Thoughtbubbles, rows: PackedRows, batch_size: int, config: EvalConfig
) -> dict[str, float]:
    """`Evaluator` on a model outside of a run, over all devices."""
    mesh = make_mesh(MeshConfig())
    trainable = make_trainable(model.config, OptimizerConfig(), 1, mesh)
    weights = jax.device_put(nnx.state(model), trainable.shardings.weights)
    return Evaluator(trainable, batch_size, config)(weights, rows)


if __name__ == "__main__":
    run_command(main, EvaluateConfig)
