"""Merge copies of a Dragon Hatchling that were tuned to two languages, without further training.

python -m train.experiments.merge_languages --out docs/quality/merge_languages.jsonl
python -m train.experiments.merge_languages --report docs/quality/merge_languages.jsonl

Language 0 is the standard library's source. Languages 1 and 2 are the same source with permuted
letters: the same grammar in other words. A base model learns language 0; one copy of the base model
is tuned to language 1, and another copy to language 2. The neurons of both copies are then
concatenated along the axis of neurons or of heads. Each finished seed is one line of the file.
"""

import dataclasses
import string
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from thoughtbubbles.hatchling import Hatchling, HatchlingConfig, grow, merge
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data import DataConfig, PackedData, TrainReader, prepare
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    markdown_table,
    mean_text,
    run_study,
)

LANGUAGES = (0, 1, 2)
SIZES = ("num_neurons", "embed_dim", "num_layers", "batch_size", "seq_len", "rows")
KEY = ("seed", "steps", "tuning_steps", *SIZES)


@dataclasses.dataclass(frozen=True)
class MergeLanguages(StudyConfig):
    """Trains, tunes and merges Dragon Hatchlings, or reports stored results.

    Attributes:
        embed_dim: Width of the models (d).
        num_neurons: Number of neurons of the base model (n).
        num_layers: Number of times that the layer is applied.
        steps: Number of training steps of the base model.
        tuning_steps: Number of training steps of each tuning, of the copies and the merged model.
        batch_size: Number of rows in a step.
        seq_len: Number of tokens in a row.
        rows: Number of held-out rows, the same rows in each language.
        optimizer: Optimizer of the base model.
        tuning: Optimizer of each tuning, of the copies and the merged model.
    """

    embed_dim: int = 32
    num_neurons: int = 1024
    num_layers: int = 3
    steps: int = 600
    tuning_steps: int = 300
    batch_size: int = 8
    seq_len: int = 64
    rows: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    tuning: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    out: str = "merge_languages.jsonl"


def main(config: MergeLanguages) -> None:
    """Train the runs that the file of results lacks, or print the table."""
    run_study(config, KEY, train_missing, report, ("tuning", "optimizer"))


def train_missing(config: MergeLanguages, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print."""
    runs = results.missing(
        {"seed": seed} | {name: getattr(config, name) for name in KEY[1:]} for seed in config.seeds
    )
    data = prepare(DataConfig(seq_len=config.seq_len)) if runs else None
    for run in runs:
        assert data is not None
        clock = Clock()
        losses = losses_of_a_seed(config, data, run["seed"])
        result = run | {"losses": losses, "cpu_seconds": clock.read().cpu_seconds}
        yield result, f"seed {run['seed']}: {result['cpu_seconds']:.0f} CPU seconds"


def losses_of_a_seed(config: MergeLanguages, data: PackedData, seed: int) -> dict[str, list[float]]:
    """Train, tune and merge the models of a seed, and score all of them.

    Returns:
        Mapping from the name of a model to its held-out nats per byte in languages 0, 1 and 2.
    """
    shape = HatchlingConfig(
        embed_dim=config.embed_dim, num_neurons=config.num_neurons, num_layers=config.num_layers
    )
    base = trained(config, data, shape, None, [0], seed)
    tuned = [trained(config, data, shape, base, [0, language], seed) for language in (1, 2)]
    models = {"base": base, "tuned to 1": tuned[0], "tuned to 2": tuned[1]}
    models |= {f"merged along {along}": merge(tuned, along) for along in ("neurons", "heads")}
    joined = models["merged along neurons"]
    every = list(LANGUAGES)
    models["merged, then tuned to all"] = trained(config, data, joined.config, joined, every, seed)
    # Controls: as many steps on all languages, with half as many neurons and with as many.
    models["base tuned to all"] = trained(config, data, shape, base, every, seed)
    twice = grow(base, 2 * config.num_neurons)  # not merged with itself: equal copies stay equal
    models["base grown, tuned to all"] = trained(config, data, twice.config, twice, every, seed)
    return {name: scores(config, data, model) for name, model in models.items()}


def trained(
    config: MergeLanguages,
    data: PackedData,
    shape: HatchlingConfig,
    start: Hatchling | None,
    languages: Sequence[int],
    seed: int,
) -> Hatchling:
    """Train or tune a model on batches whose rows alternate between languages.

    Args:
        config: Options of the experiment.
        data: Rows of language 0.
        shape: Config of the model.
        start: Model of which a copy is tuned; None trains a new model.
        languages: Languages of the rows: row i of a batch is in `languages[i % len(languages)]`.
        seed: Seed of the parameters and of the order of rows.
    """
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer, steps = config.optimizer, config.steps
    if start is not None:
        optimizer, steps = config.tuning, config.tuning_steps
    trainable = make_trainable(shape, optimizer, steps, mesh, seed)
    if start is None:
        state = trainable.init()
    else:  # a copy: training overwrites the arrays that it is given
        state = trainable.start(jax.tree.map(np.array, nnx.state(start)))
    step = make_train_step(trainable)
    reader = TrainReader(data.train, config.batch_size, seed + (start is not None))
    tables = np.stack([cipher(language) for language in languages])
    for number in range(steps):
        rows = reader.batch(number)["tokens"]
        own = tables[np.arange(len(rows)) % len(tables)]
        state, _ = step(state, place(np.take_along_axis(own, rows, axis=1), mesh))
    return trainable.model(state.variables)


def cipher(language: int) -> np.ndarray:
    """Return the table `[320]` int32 from token ids of language 0 to those of `language`."""
    table = np.arange(320, dtype=np.int32)
    if language:
        order = np.random.default_rng(language).permutation(26)
        for letters in (string.ascii_lowercase, string.ascii_uppercase):
            codes = np.frombuffer(letters.encode(), np.uint8)
            table[codes] = codes[order]
    return table


def scores(config: MergeLanguages, data: PackedData, model: Hatchling) -> list[float]:
    """Compute a model's held-out nats per byte in languages 0, 1 and 2."""
    count = len(data.validation)
    rows, _ = data.validation.read(np.linspace(0, count - 1, min(config.rows, count)).astype(int))
    found = []
    for language in LANGUAGES:
        told = np.where(rows < 0, -1, cipher(language)[np.maximum(rows, 0)])
        nats = np.asarray(_nats(model, told))
        found.append(float(nats.sum() / (told[:, 1:] >= 0).sum()))
    return found


@jax.jit
def _nats(model: Hatchling, rows: Any) -> jax.Array:
    return model.token_losses(rows)[0]


def report(results: list[Result]) -> str:
    """Format a Markdown table with a row for each model and a column for each language.

    Raises:
        ValueError: The results differ in an option of `KEY`.
    """
    kinds = {tuple(result[name] for name in KEY[1:]) for result in results}
    if len(kinds) > 1:
        raise ValueError(f"the file has results of {len(kinds)} settings: give each its own --out")
    names = list(results[0]["losses"]) if results else []
    head = ("nats per byte", *(f"language {language}" for language in LANGUAGES))
    rows = []
    for name in names:
        columns = zip(*(result["losses"][name] for result in results), strict=True)
        rows.append((name, *(mean_text(list(values), 3) for values in columns)))
    seeds = " ".join(str(result["seed"]) for result in results)
    return "\n".join([*markdown_table(head, rows), "", f"seeds {seeds}"])


def command() -> None:
    run_command(main, MergeLanguages)


if __name__ == "__main__":
    command()
