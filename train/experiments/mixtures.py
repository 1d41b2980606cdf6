"""Measure what a small model learns as the fraction of one source grows from 0 to 100 %.

python -m train.experiments.mixtures --category code --out mixtures.jsonl
python -m train.experiments.mixtures --report mixtures.jsonl

All models are trained on equally many tokens. If one source gets another fraction of the tokens,
the other sources keep their proportions. The sources are sums, and the code and the prose of
Python's standard library, which are separated with Python's tokenizer. Each model is scored by its
held-out loss on each source, and by two probes on synthetic texts that belong to no source: the
accuracy of closing nested brackets, and the loss on the repetition of a string of random letters.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles import Architecture, ModelConfig
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data import DataConfig, MixtureReader, PackedData, SplitCorpus, mix, parse_mixture
from train.data.labels import prose_characters
from train.data.prepared import prepare_documents
from train.data.shares import with_share
from train.data.text_files import standard_library
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, TrainState, make_trainable
from train.engine.step import TrainStep, make_train_step
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

KEY = ("category", "share", "steps", "seed")
BASE = {"code": 0.4, "prose": 0.4, "sums": 0.2}
"""Mixture weights of the sources before the fraction of one source is changed."""

SEQ_LEN, BATCH = 64, 32
MODEL = ModelConfig(vocab_size=320, embed_dim=64, num_layers=2, num_heads=2, mlp_dim=256)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3)
PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclasses.dataclass(frozen=True)
class Mixtures(StudyConfig):
    """Trains one model for each fraction of a source, or reports stored results.

    Attributes:
        category: Source whose fraction is changed: "code", "prose" or "sums".
        shares: Fractions of this source, from 0 to 1; the other sources keep their proportions.
        steps: Number of training steps, equal for all fractions.
        rows: Number of held-out rows of each source, and of each probe.
    """

    category: str = "code"
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    steps: int = 1000
    rows: int = 256
    out: str = "mixtures.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("source", (self.category,), BASE)
        for share in self.shares:
            with_share(BASE, [self.category], share)


def main(config: Mixtures) -> None:
    """Train the runs that the file of results lacks, or print the tables."""
    run_study(config, KEY, train_missing, report, ("rows",))


def train_missing(config: Mixtures, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    All runs of a seed use the same compiled program.
    """
    runs = results.missing(
        {"category": config.category, "share": share, "steps": config.steps, "seed": seed}
        for seed in config.seeds
        for share in config.shares
    )
    parts = packed_sources() if runs else {}
    for seed, of_seed in itertools.groupby(runs, key=lambda run: run["seed"]):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        trainable = make_trainable(
            MODEL, OptimizerConfig(learning_rate=3e-3), config.steps, mesh, seed
        )
        step, scorer = make_train_step(trainable), Scorer(trainable, parts, config.rows)
        for run in of_seed:
            weights = with_share(BASE, [config.category], run["share"])
            clock = Clock()
            state = trained(trainable, step, weights, parts, config.steps)
            scores = scorer(state.variables)
            result = run | {"weights": weights, "rows": config.rows} | scores
            result |= {"seconds": clock.read().seconds, "jax": jax.__version__}
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            yield result, f"{run['category']} {run['share']:.0%} seed {seed}: {shown}"


def trained(
    trainable: Trainable,
    step: TrainStep,
    weights: Mapping[str, float],
    parts: Mapping[str, PackedData],
    steps: int,
) -> TrainState:
    """Train a model from random initial parameters on a mixture.

    Args:
        trainable: Structure of the model, and its mesh.
        step: Compiled training step.
        weights: Mapping from a source to its mixture weight; sources of weight 0 are left out.
        parts: Mapping from a source to its packed rows.
        steps: Number of training steps.
    """
    weights = {name: weight for name, weight in weights.items() if weight}
    mixture = parse_mixture(f"mix({weights!r})")
    data = mix(mixture, {name: parts[name] for name in weights})
    state = trainable.init()
    batches = MixtureReader(data, BATCH, trainable.seed).iterate()
    for batch in itertools.islice(batches, steps):
        state, _ = step(state, place(batch["tokens"], trainable.mesh))
    batches.close()
    return state


class Scorer:
    """Scorer of a model by held-out loss on each source and by the probes, compiled only once.

    Args:
        trainable: Structure of the model, and its mesh.
        parts: Mapping from a source to its packed rows.
        rows: Number of rows of each source and of each probe.
    """

    def __init__(self, trainable: Trainable, parts: Mapping[str, PackedData], rows: int):
        self._parts = parts
        self._evaluate = Evaluator(trainable, BATCH, EvalConfig(rows=rows))
        self._brackets = brackets(rows)
        self._repeats = repeats(rows)
        self._closers = jnp.array([ord(sign) for sign in PAIRS.values()])

        def guesses(variables: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Predict a closing bracket after each token; also nats of the next token, `[N, T]`."""
            model: Architecture = trainable.model(variables)
            nats, output = model.token_losses(tokens)
            closers = model.logits(output)[..., self._closers]
            return self._closers[closers.argmax(axis=-1)], nats

        self._guesses = jax.jit(guesses)

    def __call__(self, variables: Any) -> dict[str, float]:
        """Score a model.

        Args:
            variables: State of the model's parameters (`TrainState.variables`).

        Returns:
            `NAME_loss`, the held-out nats per token of each source NAME; `brackets`, the fraction
            of closing brackets that are predicted right; and `repeats`, the nats per letter of the
            repeated string.
        """
        found = {
            f"{name}_loss": self._evaluate(variables, part.validation)["loss"]
            for name, part in self._parts.items()
        }
        guess = np.asarray(self._guesses(variables, self._brackets)[0])
        targets = self._brackets[:, 1:]
        closes = np.isin(targets, np.asarray(self._closers))
        nats = np.asarray(self._guesses(variables, self._repeats)[1])
        return found | {
            "brackets": float((guess == targets)[closes].mean()),
            "repeats": float(nats[:, SEQ_LEN // 2 :].mean()),
        }


def brackets(rows: int) -> np.ndarray:
    """Generate rows of nested brackets of three kinds and letters, `[rows, SEQ_LEN + 1]` int32.

    Each closing bracket is of the same kind as the innermost bracket that is still open; a random
    choice of the kind is right in 1/3 of cases.
    """
    rng = random.Random(0)
    found = []
    for _ in range(rows):
        text, open_ones = "", []
        while len(text) <= SEQ_LEN:
            if open_ones and (len(open_ones) > 4 or rng.random() < 0.5):
                text += PAIRS[open_ones.pop()]
            else:
                open_ones.append(rng.choice("([{"))
                text += open_ones[-1]
            text += rng.choice("abcdefgh") * (rng.random() < 0.5)
        found.append(list(text[: SEQ_LEN + 1].encode()))
    return np.array(found, np.int32)


def repeats(rows: int) -> np.ndarray:
    """Generate rows of a string of random letters and its copy, `[rows, SEQ_LEN + 1]` int32.

    Only the copy is scored. A model that attends to the first string can score near 0 nats per
    letter; a model that does not attend to the first string scores at best ln 26 = 3.26.
    """
    letters = np.random.default_rng(0).integers(97, 123, (rows, SEQ_LEN // 2))
    return np.concatenate([np.full((rows, 1), 10), letters, letters], axis=1).astype(np.int32)


def packed_sources() -> dict[str, PackedData]:
    """Prepare packed rows of each source; returns a mapping from a source in `BASE` to its rows."""
    config = DataConfig(seq_len=SEQ_LEN)
    documents = {"code": lambda: library(False), "prose": lambda: library(True), "sums": sums}
    return {
        name: prepare_documents(SplitCorpus(name, of, config.validation), config)
        for name, of in documents.items()
    }


def library(prose: bool) -> Iterator[str]:
    """Yield the prose (comments, multi-line strings) or the code of each standard-library file."""
    source = standard_library()
    for file in source.files:
        text = (source.root / file).read_text(encoding="utf-8", errors="replace")
        try:
            is_prose = prose_characters(text)
        except (tokenize.TokenError, SyntaxError):  # a file in the syntax of another Python version
            continue
        kept = (
            sign for sign, of in zip(text, is_prose, strict=True) if of == prose or sign == "\n"
        )
        yield "\n".join(line.rstrip() for line in "".join(kept).splitlines() if line.strip())


def sums() -> Iterator[str]:
    """Yield documents of a hundred sums of numbers below 1000."""
    rng = random.Random(0)
    for _ in range(1000):
        pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(100)]
        yield "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


def report(results: list[Result]) -> str:
    """Format a Markdown table for each category and number of steps; rows are fractions."""
    lines = []
    for (category, steps), runs in by_key(results, "category", "steps").items():
        names = [*(f"{name}_loss" for name in BASE), "brackets", "repeats"]
        tokens = steps * BATCH * SEQ_LEN
        lines += [f"share of {category}, {steps:,} steps, {tokens:,} tokens", ""]
        rows = [
            (
                f"{share:.0%}",
                seeds_text(of_share),
                *(mean_text([run[name] for run in of_share], 3) for name in names),
            )
            for (share,), of_share in sorted(by_key(runs, "share").items())
        ]
        head = (category, "seeds", *(name.replace("_", " ") for name in names))
        lines += [*markdown_table(head, rows), ""]
    return "\n".join(lines)


def command() -> None:
    run_command(main, Mixtures)


if __name__ == "__main__":
    command()
