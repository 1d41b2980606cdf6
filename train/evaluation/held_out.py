"""Held-out loss of packed rows, also scored prefix-only if the model's policy is not causal."""

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles import Architecture
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from thoughtbubbles.quantisation import in_int8, quantise
from train.cli.config_json import from_json
from train.data import DataConfig, PackedRows, evaluation_batches, prepare
from train.data.config import OF_WEIGHTS
from train.data.mixture import JoinedRows
from train.data.stored import stored_split
from train.devices.mesh import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    place,
    replicated,
)
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, make_trainable
from train.models.load import LoadedRun, keep_tokenizer
from train.runs.metadata import why_other_data

_OF_DATA = ("config", "data_fingerprint", "python", "sources")  # fields of a run about its data


class Evaluator:
    """Scorer of packed rows with a model's parameters; its functions are compiled once.

    A teacher-forced forward pass scores all positions of a row at once. For a policy that looks at
    the whole row (`TopK`), the result is not the loss of an autoregressive model. For this kind of
    policy, a sample of positions is also scored with only the prefix of each position as input.

    Args:
        trainable: Static side of a run: structure of the model, mesh and shardings.
        batch_size: Number of rows in a forward pass.
        config: Number of rows and positions to score.
    """

    def __init__(self, trainable: Trainable, batch_size: int, config: EvalConfig):
        self._mesh, self._config = trainable.mesh, config
        self._causal = trainable.config.causal
        self._batch_size = batch_size
        shardings = (trainable.shardings.variables, batch_sharding(self._mesh))
        everywhere = replicated(self._mesh)

        def teacher_forced(variables: Any, rows: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            """Compute nats `[N, T]` of N rows, and the `row_statistics` `[N]` of the rows."""
            model = trainable.model(variables)
            nats, output = model.token_losses(rows)
            return nats, model.row_statistics(output)

        def prefix_only(variables: Any, prefixes: jax.Array) -> jax.Array:
            """Compute nats `[N]` of the last token of each row, which is padded with -1."""
            model = trainable.model(variables)
            length = (prefixes >= 0).sum(axis=1, dtype=jnp.int32) - 1
            target = jnp.take_along_axis(prefixes, length[:, None], axis=1)
            output = model.run(jnp.maximum(prefixes[:, :-1], 0), length)
            log_probs = jax.nn.log_softmax(model.logits_at(output, length - 1), axis=-1)
            return -jnp.take_along_axis(log_probs, target, axis=1)[:, 0]

        self._teacher_forced = jax.jit(
            teacher_forced, in_shardings=shardings, out_shardings=everywhere
        )
        self._prefix_only = jax.jit(prefix_only, in_shardings=shardings, out_shardings=everywhere)

    def __call__(self, variables: Any, rows: PackedRows) -> dict[str, float]:
        """Compute the metrics of a sample of rows that are evenly spaced over the split.

        For a policy that is not causal, `loss` is the teacher-forced mean over all positions, plus
        the mean difference between prefix-only and teacher-forced nats at the sampled positions.

        The sources of a mixture are scored one by one. Metrics of the mixture are means over
        sources, with the mixture weights at the end of the mixture's schedule.

        Args:
            variables: State of the model's parameters (`TrainState.variables`).
            rows: Rows of the split.

        Returns:
            Mapping from names to metrics: `loss` (nats per token) and `bits_per_byte` of the
            autoregressive model; `standard_error` of `loss` as an estimate for the whole split, 0
            if all rows and positions are scored; and `streams_per_token`, the mean after the last
            block, of a model that forks. A policy that is not causal also has the teacher-forced
            `blockwise_loss` and `blockwise_bits_per_byte`. A mixture also has the metrics of each
            source, as `source/NAME/...`.
        """
        if isinstance(rows, JoinedRows):
            scored = {name: self(variables, part) for name, part in rows.parts.items()}
            return over_sources(scored, dict(zip(rows.parts, rows.weights, strict=True)))
        tokens, nats, sums, num_bytes = self._score_teacher_forced(variables, rows)
        weight = tokens[:, 1:] >= 0
        total, count = float(nats[weight].sum()), int(weight.sum())
        to_bits = count / math.log(2) / max(num_bytes, 1)
        blockwise = total / count
        error = _error_of_mean(nats, weight, len(rows))
        read = int((tokens[:, :-1] >= 0).sum())
        per_token = {f"{name}_per_token": value / read for name, value in sums.items()}
        if self._causal:
            return {
                "loss": blockwise,
                "bits_per_byte": blockwise * to_bits,
                "standard_error": error,
                **per_token,
            }
        row, position = np.nonzero(weight)
        chosen = self._choose(len(row))
        row, position = row[chosen], position[chosen]
        gaps = self._score_prefixes(variables, tokens, row, position) - nats[row, position]
        gap_error = gaps.std(ddof=1) / math.sqrt(len(gaps)) if len(gaps) < count else 0.0
        loss = blockwise + float(gaps.mean())
        return {
            "loss": loss,
            "bits_per_byte": loss * to_bits,
            "standard_error": math.hypot(error, gap_error),
            **per_token,
            "blockwise_loss": blockwise,
            "blockwise_bits_per_byte": blockwise * to_bits,
        }

    def _score_teacher_forced(self, variables: Any, rows: PackedRows):
        tokens, nats, sums, num_bytes = [], [], collections.Counter(), 0
        limit = self._config.rows or None
        for batch in evaluation_batches(rows, self._batch_size, limit):
            scored = self._teacher_forced(variables, place(batch["tokens"], self._mesh))
            tokens.append(batch["tokens"])
            nats.append(np.asarray(scored[0]))
            sums.update({name: np.asarray(rows).sum().item() for name, rows in scored[1].items()})
            num_bytes += int(batch["bytes"].sum())
        return np.concatenate(tokens), np.concatenate(nats), sums, num_bytes

    def _choose(self, count: int) -> np.ndarray:
        positions = self._config.positions
        if not 0 < positions < count:
            return np.arange(count)
        return np.sort(np.random.default_rng(0).choice(count, positions, replace=False))

    def _score_prefixes(self, variables, tokens, row, position) -> np.ndarray:
        """Compute nats `[N]` of the targets at `row`, `position`, with only prefixes as input."""
        scores = []
        for start in range(0, len(row), self._batch_size):
            part = slice(start, start + self._batch_size)
            prefixes = np.full((self._batch_size, tokens.shape[1]), -1, np.int32)
            prefixes[:, :2] = 0  # rows that pad the batch are two tokens long
            ends = position[part] + 1
            for index, (source, end) in enumerate(zip(row[part], ends, strict=True)):
                prefixes[index] = -1
                prefixes[index, : end + 1] = tokens[source, : end + 1]
            scored = np.asarray(self._prefix_only(variables, place(prefixes, self._mesh)))
            scores.append(scored[: len(ends)])
        return np.concatenate(scores)


def over_sources(
    scored: dict[str, dict[str, float]], weights: dict[str, float]
) -> dict[str, float]:
    """Combine the metrics of sources into metrics of their mixture.

    Args:
        scored: Mapping from the name of a source to its metrics.
        weights: Mapping from the name of a source to its fraction of the mixture's tokens.

    Returns:
        Mapping from names to metrics of the mixture and, as `source/NAME/...`, to metrics of each
        source.
    """
    found: dict[str, float] = {}
    for name in next(iter(scored.values())):
        found[name] = sum(weights[source] * of[name] for source, of in scored.items())
    errors = [weights[source] * of["standard_error"] for source, of in scored.items()]
    found["standard_error"] = math.hypot(*errors)
    for prefix in {name.removesuffix("bits_per_byte") for name in found if "bits_per_" in name}:
        # In each source, the number of bytes per token is loss / ln 2 / bits_per_byte.
        loss, bits = f"{prefix}loss", f"{prefix}bits_per_byte"
        if all(of[bits] for of in scored.values()):  # else the number of bytes is unknown
            num_bytes = sum(weights[source] * of[loss] / of[bits] for source, of in scored.items())
            found[bits] = found[loss] / num_bytes
    for source, metrics in scored.items():
        found |= {f"source/{source}/{name}": value for name, value in metrics.items()}
    return found


def _error_of_mean(nats: np.ndarray, weight: np.ndarray, rows_in_split: int) -> float:
    """Compute the standard error of the mean nats over targets, for a sample of whole rows.

    Returns:
        Standard error; 0 if fewer than two rows, or all rows of the split, were scored.
    """
    scored = weight.any(axis=1)
    total, count = (nats * weight).sum(axis=1)[scored], weight.sum(axis=1)[scored]
    number = len(count)
    if number < 2 or number >= rows_in_split:
        return 0.0
    spread = total - count * (total.sum() / count.sum())
    variance = np.square(spread).sum() * number / (number - 1)
    return float(np.sqrt(variance * (1 - number / rows_in_split)) / count.sum())


def readable(metrics: dict[str, float]) -> str:
    """Format held-out metrics as one line of text."""
    line = (
        f"held-out loss {metrics['loss']:.4f} ± {metrics['standard_error']:.4f} nats/token, "
        f"{metrics['bits_per_byte']:.4f} bits/byte"
    )
    ending = "_per_token"
    for name in metrics:
        if name.endswith(ending) and not name.startswith("source/"):
            line += f", {metrics[name]:.2f} {name.removesuffix(ending)}/token"
    if "blockwise_loss" in metrics:
        line += f" (prefix-only); teacher-forced {metrics['blockwise_loss']:.4f}, not causal"
    sources = [name.split("/", 1)[1].rsplit("/", 1)[0] for name in metrics if _is_source(name)]
    losses = [f"{name} {metrics[f'source/{name}/loss']:.4f}" for name in sources]
    return f"{line}; {', '.join(losses)}" if losses else line


def _is_source(name: str) -> bool:
    return name.startswith("source/") and name.endswith("/loss")


def validation_rows(loaded: LoadedRun) -> PackedRows:
    """Load the held-out rows of a run from the data cache, or prepare the corpus of the run again.

    Raises:
        ValueError: The run was fine-tuned and has no corpus, its config has fields that a newer
            version wrote, or the rows are not in the cache and the corpus has changed.
    """
    if "weights" in loaded.config:
        raise ValueError(
            "this run was fine-tuned on chat data, its held-out loss is in metrics.jsonl: pass "
            "--tasks FILE"
        )
    config: DataConfig = from_json(DataConfig, loaded.config.get("data"), "data")
    stored = stored_split(config, loaded.data_fingerprint, loaded.sources, "validation")
    if stored is not None:
        return stored
    if config.tokenizer.startswith(OF_WEIGHTS) and isinstance(
        loaded.tokenizer, PretrainedTokenizer
    ):
        keep_tokenizer(loaded.tokenizer, config)
    data = prepare(config)
    if data.fingerprint != loaded.data_fingerprint:
        meta = {name: getattr(loaded, name) for name in _OF_DATA}
        raise ValueError(
            f"the run was trained on data {loaded.data_fingerprint}, the corpus is now "
            f"{data.fingerprint}: restore the corpus {config.corpus}"
            f"{why_other_data(meta)}"
        )
    return data.validation


def held_out(
    model: Architecture, rows: PackedRows, batch_size: int, config: EvalConfig
) -> dict[str, float]:
    """Compute the metrics of `Evaluator` for a loaded model, on all devices.

    Args:
        model: Model to score.
        rows: Rows of the held-out split.
        batch_size: Number of rows in a forward pass.
        config: Number of rows and positions to score.
    """
    mesh = make_mesh(MeshConfig())
    wrap = quantise if in_int8(model) else None
    trainable = make_trainable(model.config, OptimizerConfig(), 1, mesh, wrap=wrap)
    variables = jax.device_put(nnx.state(model), trainable.shardings.variables)
    return Evaluator(trainable, batch_size, config)(variables, rows)
