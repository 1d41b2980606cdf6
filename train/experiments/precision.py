"""Measure how much loss bfloat16 adds to trained models, and how often they fork differently.

Models of several presets are trained in float32. Each trained model is then scored on the same
held-out rows in float32 and in bfloat16. The plain decoder, which has no forks, is the control.

python -m train.experiments.precision --steps 200
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from thoughtbubbles import Thoughtbubbles
from thoughtbubbles.architecture import architecture_of
from thoughtbubbles.bubbles import bubbles_of
from train.cli.command import run_command
from train.cli.numbers import check_least
from train.engine.config import EvalConfig
from train.evaluation.held_out import validation_rows
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    check_finished,
    check_names,
    differing,
    markdown_table,
    mean_text,
    run_study,
    settings_text,
)
from train.models.load import load_model
from train.pretraining.config import RunConfig
from train.pretraining.job import train
from train.pretraining.presets import PRESETS

KEY = ("variant", "seed", "steps")
VARIANTS = {"plain": "tiny_plain", "prefix_rank": "tiny", "threshold": "tiny_threshold"}
"""Mapping from a variant to the name of its preset."""
BATCH = 8  # rows of a forward pass


@dataclasses.dataclass(frozen=True)
class Precision(StudyConfig):
    """Trains in float32 and scores in float32 and bfloat16, or reports stored scores.

    Attributes:
        variants: Variants to train: "plain", "prefix_rank" and "threshold".
        steps: Number of training steps.
        rows: Number of held-out rows to score, the first rows of the split.
    """

    variants: tuple[str, ...] = tuple(VARIANTS)
    steps: int = 200
    rows: int = 64
    seeds: tuple[int, ...] = (0,)
    out: str = "precision.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("variant", self.variants, VARIANTS)
        check_least(self, rows=2)


def main(config: Precision) -> None:
    """Train the runs that the file of results lacks, or print the table."""
    run_study(config, KEY, train_missing, report, ("rows",))


def train_missing(config: Precision, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print."""
    runs = results.missing(
        {"variant": variant, "seed": seed, "steps": config.steps}
        for seed in config.seeds
        for variant in config.variants
    )
    for run in runs:
        preset = PRESETS[VARIANTS[run["variant"]]]
        with tempfile.TemporaryDirectory() as folder:
            result = run | train_and_score(
                dataclasses.replace(
                    preset,
                    seed=run["seed"],
                    steps=config.steps,
                    save_every=config.steps,
                    evaluation=EvalConfig(every=0, rows=BATCH, positions=2),
                    out=folder,
                ),
                config.rows,
            )
        yield result, f"{run['variant']} seed {run['seed']}: {result}"


def train_and_score(config: RunConfig, rows: int) -> Result:
    """Train a model in float32, and compare its held-out loss and bubbles in float32 and bfloat16.

    Returns:
        Entries of a result: the number of scored `rows`; `loss`, in float32 and nats per token;
        `added`, the loss in bfloat16 minus `loss`, with its standard error `added_error` over rows;
        `size_of_added`, the mean absolute difference of a token's loss; `rows_elsewhere`, the
        number of rows, and `tokens_elsewhere`, the fraction of tokens, whose bubbles differ in
        their number of streams; `added_elsewhere` and `added_same`, the means of the added loss
        over rows with and without different bubbles, None if there are no such rows.
    """
    train(config)
    check_finished(config.out, config.steps)
    loaded = load_model(config.out)
    assert isinstance(loaded.model, Thoughtbubbles)
    held_out = validation_rows(loaded)
    tokens = np.stack([held_out[index][0] for index in range(min(rows, len(held_out)))])
    nats, streams = scores(loaded.model, tokens)
    half = dataclasses.replace(loaded.model.config, dtype="bfloat16")
    params = nnx.to_pure_dict(nnx.state(loaded.model))
    model = architecture_of(half).from_params(half, params)
    assert isinstance(model, Thoughtbubbles)
    half_nats, half_streams = scores(model, tokens)
    added = half_nats.mean(axis=1) - nats.mean(axis=1)
    other = (streams != half_streams).any(axis=1)  # of each token
    elsewhere = other.any(axis=1)
    return {
        "rows": len(tokens),
        "loss": float(nats.mean()),
        "added": float(added.mean()),
        "added_error": float(added.std(ddof=1) / len(added) ** 0.5),
        "size_of_added": float(np.abs(half_nats - nats).mean()),
        "rows_elsewhere": int(elsewhere.sum()),
        "tokens_elsewhere": float(other.mean()),
        "added_elsewhere": float(added[elsewhere].mean()) if elsewhere.any() else None,
        "added_same": float(added[~elsewhere].mean()) if not elsewhere.all() else None,
    }


def scores(model: Thoughtbubbles, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the loss of each next token, and the number of streams of each input token.

    Args:
        model: Model to score.
        tokens: Token ids of `N` rows, `[N, T + 1]` int32.

    Returns:
        Nats `[N, T]`, and numbers of streams `[N, F, T]` int32 after each of `F` fork layers.
    """

    @jax.jit
    def run(model: Thoughtbubbles, rows: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        nats, output = model.token_losses(rows)
        return nats, [bubbles_of(streams)[0] for streams in output.forks]

    found = [run(model, tokens[at : at + BATCH]) for at in range(0, len(tokens), BATCH)]
    nats = np.concatenate([np.asarray(part[0]) for part in found])
    none = np.zeros((len(tokens), 0, nats.shape[1]), np.int32)
    forks = [
        np.concatenate([np.asarray(part[1][n]) for part in found]) for n in range(len(found[0][1]))
    ]
    return nats, np.stack(forks, axis=1) if forks else none


def report(results: list[Result]) -> str:
    """Format a Markdown table with a row for each run, which names `steps` if runs differ in it."""
    head = ["", "seed", "loss in float32", "bfloat16 adds", "of a token, either way"]
    head += ["rows with other bubbles", "tokens with other bubbles"]
    differ = differing(results, ("steps",))
    lines: list[Sequence[str]] = []
    for found in results:
        forks = found["variant"] != "plain"
        lines.append(
            [
                f"{found['variant']}{settings_text(found, differ)}",
                str(found["seed"]),
                mean_text([found["loss"]], 4),
                f"{found['added']:+.5f} ± {found['added_error']:.5f}",
                f"{found['size_of_added']:.5f}",
                f"{found['rows_elsewhere']} of {found['rows']}" if forks else "",
                f"{found['tokens_elsewhere']:.2%}" if forks else "",
            ]
        )
    return "\n".join(markdown_table(head, lines))


def command() -> None:
    run_command(main, Precision)


if __name__ == "__main__":
    command()
