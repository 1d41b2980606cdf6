"""Measure how well a frozen decoder uses images as one source of its training text grows.

python -m train.experiments.visual_priors --category scenes --out visual_priors.jsonl
python -m train.experiments.visual_priors --report visual_priors.jsonl

This follows "Learning to See Before Seeing" (arXiv 2509.26625) at a size for a CPU. A decoder is
trained on text alone, once for each fraction of one source, always on equally many tokens. Then the
decoder is frozen, and a projector is trained that turns images of shapes into soft tokens for the
decoder (`train.probes.visual`). The decoder is scored by its answers to questions about held-out
images, in comparison with three controls (`train.probes.visual.CONDITIONS`), and by the alignment
of its hidden states of captions with the images.

The sources of text are code and prose of Python's standard library, sums, and scenes: captions of
images of shapes, each followed by true statements in the words of the questions. No text of the
source "scenes" describes the objects of a held-out scene.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from thoughtbubbles import ModelConfig
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.cli.numbers import check_least
from train.data import DataConfig, PackedData, SplitCorpus, Tokenizer
from train.data.bpe import train_tokenizer
from train.data.prepared import prepare_documents
from train.data.shares import with_share
from train.data.storage import build_once
from train.devices.mesh import MeshConfig, make_mesh
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.evaluation.held_out import Evaluator
from train.experiments import mixtures
from train.experiments.study import (
    INDEX,
    Result,
    Results,
    StudyConfig,
    by_key,
    check_names,
    differing,
    markdown_table,
    mean_text,
    run_study,
    seeds_text,
    settings_text,
)
from train.probes.alignment import alignment
from train.probes.scenes import ANSWERS, distinct_scenes, scene
from train.probes.visual import CONDITIONS, ProbeConfig, VisualProbe

KEY = ("category", "share", "steps", "rows", "neighbours", "probe", "seed")
REPORTED = ("category", "steps", "rows", "neighbours", "probe")  # two tables for each combination
BASE = {"code": 0.3, "prose": 0.3, "sums": 0.2, "scenes": 0.2}
"""Mixture weights of the sources before the fraction of one source is changed."""

VOCAB = 512
MODEL = ModelConfig(vocab_size=VOCAB, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3)
TEXTS = 20_000  # number of documents of the source of scenes
FIRST_TEXT = 2**40  # index of the first scene of these texts; projectors train on smaller indices
ALIGNED = 256  # number of held-out scenes over which captions are aligned with images


@dataclasses.dataclass(frozen=True)
class VisualPriors(StudyConfig):
    """Trains and probes a decoder for each fraction of a source, or reports stored results.

    Attributes:
        category: Source whose fraction is changed: "code", "prose", "sums" or "scenes".
        shares: Fractions of this source, from 0 to 1; the other sources keep their proportions.
        steps: Number of training steps of each decoder; 0 leaves its random parameters untrained.
        rows: Number of held-out rows of each source, over which losses are averaged.
        neighbours: Number of nearest neighbours (k) of the alignment, from 1 to 255.
        probe: Options of the projector, its training and its test.

    Raises:
        ValueError: The source is unknown, a fraction is not from 0 to 1, or a number is out of
            range.
    """

    category: str = "scenes"
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    steps: int = dataclasses.field(default=2000, metadata=INDEX)
    rows: int = 128
    neighbours: int = 10
    probe: ProbeConfig = ProbeConfig()
    out: str = "visual_priors.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("source", (self.category,), BASE)
        check_least(self, rows=1, neighbours=1)
        for share in self.shares:
            with_share(BASE, [self.category], share)
        if self.neighbours >= ALIGNED:
            raise ValueError(
                f"neighbours={self.neighbours} among {ALIGNED} scenes: choose from 1 to "
                f"{ALIGNED - 1}"
            )


def main(config: VisualPriors) -> None:
    """Train and probe the decoders that the file of results lacks, or print the tables."""
    run_study(config, KEY, train_missing, report)


def train_missing(config: VisualPriors, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    All fractions of a seed use the same compiled programs.
    """
    fixed = {name: getattr(config, name) for name in ("category", "steps", "rows", "neighbours")}
    options = dataclasses.asdict(config.probe).items()
    fixed |= {"probe": ", ".join(f"{name} {value}" for name, value in options)}
    runs = results.missing(
        fixed | {"share": share, "seed": seed} for seed in config.seeds for share in config.shares
    )
    parts = packed_sources() if runs else {}
    for seed, of_seed in itertools.groupby(runs, key=lambda run: run["seed"]):
        arms = Arms(config, parts, seed)
        for run in of_seed:
            clock = Clock()
            scores = arms(run["share"])
            cost = clock.read()
            result = run | scores | {"seconds": cost.seconds, "cpu_seconds": cost.cpu_seconds}
            result |= {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
            shown = ", ".join(
                f"{kind} {of['image'][0]:.2f} (shuffled {of['shuffled'][0]:.2f})"
                for kind, of in scores["answers"].items()
            )
            aligned = scores["alignment"]
            yield (
                result,
                f"{run['category']} {run['share']:.0%} seed {seed}: {shown}, "
                f"alignment {aligned['value']:.3f} (permuted {aligned['permuted']:.3f})",
            )


class Arms:
    """Trainer and scorer of the decoders of one seed, whose programs are compiled only once.

    Args:
        config: Options of the study.
        parts: Mapping from a source in `BASE` to its packed rows; all sources use one tokenizer.
        seed: Seed of parameters, of the order of rows, and of the scenes that projectors are
            trained on and that captions are aligned over.
    """

    def __init__(self, config: VisualPriors, parts: Mapping[str, PackedData], seed: int):
        self._config, self._parts = config, parts
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self._trainable = make_trainable(MODEL, OPTIMIZER, max(config.steps, 1), mesh, seed)
        self._step = make_train_step(self._trainable)
        evaluation = EvalConfig(rows=config.rows)
        self._evaluate = Evaluator(self._trainable, mixtures.BATCH, evaluation)
        tokenizer: Tokenizer = next(iter(parts.values())).tokenizer
        encode = lambda text: [tokenizer.separator, *tokenizer.encode(text)[0].tolist()]  # noqa: E731
        self._probe = VisualProbe(MODEL, encode, config.probe, seed)
        self._scenes = list(itertools.islice(distinct_scenes(seed, "validation"), ALIGNED))

    def __call__(self, share: float) -> dict[str, Any]:
        """Train a decoder on a mixture, train projectors for the frozen decoder, and score both.

        Args:
            share: Fraction of `config.category` in the mixture, from 0 to 1.

        Returns:
            Entries of a result. `weights` maps each source to its mixture weight, and `losses` to
            its held-out nats per token. `answers` maps each kind of question to a mapping from
            condition to `Rate` of right answers. `answer_loss` has the training loss of the
            projectors for images (`image`) and for blank images (`blank`), the mean over the last
            tenth of the steps in nats per token of an answer. `alignment` has the fields of
            `train.probes.alignment.Alignment`.
        """
        config = self._config
        weights = with_share(BASE, [config.category], share)
        state = mixtures.trained(self._trainable, self._step, weights, self._parts, config.steps)
        losses = {
            name: self._evaluate(state.variables, part.validation)["loss"]
            for name, part in self._parts.items()
        }
        model = self._trainable.model(state.variables)
        seeing, loss = self._probe.train(model)
        blank, blank_loss = self._probe.train(model, blank=True)
        answers = self._probe.scores(seeing, blank)
        captions = self._probe.caption_states(model, self._scenes)
        images = self._probe.features(self._scenes)
        aligned = alignment(captions, images.reshape(len(images), -1), config.neighbours)
        return {
            "weights": weights,
            "losses": losses,
            "answers": answers,
            "answer_loss": {"image": loss, "blank": blank_loss},
            "alignment": aligned._asdict(),
        }


def packed_sources() -> dict[str, PackedData]:
    """Prepare packed rows of each source; returns a mapping from a source in `BASE` to its rows.

    All sources use one BPE tokenizer of `VOCAB` ids, which is trained on equally many characters of
    each source and kept in the data cache.
    """
    data = DataConfig(seq_len=mixtures.SEQ_LEN)
    documents = {
        "code": lambda: mixtures.library(False),
        "prose": lambda: mixtures.library(True),
        "sums": mixtures.sums,
        "scenes": texts,
    }
    corpora = {name: SplitCorpus(name, of, data.validation) for name, of in documents.items()}
    sample = SplitCorpus("sample", lambda: _sample(corpora), data.validation)
    folder = data.cache / "tokenizers" / f"visual_priors_{VOCAB}_{sample.fingerprint}"
    file = folder / "tokenizer.json"

    def build(partial: Path) -> None:
        train_tokenizer(sample, VOCAB).save(str(partial / file.name))

    build_once(folder, build)
    data = dataclasses.replace(data, tokenizer=str(file))
    return {name: prepare_documents(corpus, data) for name, corpus in corpora.items()}


def texts() -> Iterator[str]:
    """Yield `TEXTS` captions of training scenes, each with true statements about its scene.

    The projectors are trained on other scenes, but mostly of the same sets of objects, since there
    are only 3,808 sets. Held-out sets never occur in these texts.
    """
    return (scene(0, "train", FIRST_TEXT + index).text() for index in range(TEXTS))


def _sample(corpora: Mapping[str, SplitCorpus]) -> Iterator[str]:
    """Yield documents with the first 100,000 characters of each source's training split."""
    for corpus in corpora.values():
        left = 100_000
        for document in corpus.documents("train"):
            yield document[:left]
            left -= len(document)
            if left <= 0:
                break


def report(results: list[Result]) -> str:
    """Format two Markdown tables for each combination of `REPORTED`.

    The first table has the rates of right answers, with a row for each fraction and kind of
    question, and a column for each condition. The second table has the held-out losses of the
    sources and the alignment, with a row for each fraction.
    """
    lines, differ = [], differing(results, ("rows", "neighbours"))
    for (category, steps, *_), runs in by_key(results, *REPORTED).items():
        tokens = steps * mixtures.BATCH * mixtures.SEQ_LEN
        how = settings_text(runs[0], differ)
        lines += [f"share of {category}, {steps:,} steps, {tokens:,} tokens{how}", ""]
        lines += [f"projector: {runs[0]['probe']}", ""]
        arms = sorted(by_key(runs, "share").items())
        rows = [
            (f"{share:.0%}", seeds_text(of), kind, *(_rate(of, kind, name) for name in CONDITIONS))
            for (share,), of in arms
            for kind in ANSWERS
        ]
        lines += [*markdown_table((category, "seeds", "question", *CONDITIONS), rows), ""]
        rows = [
            (
                f"{share:.0%}",
                seeds_text(of),
                *(mean_text([run["losses"][name] for run in of], 3) for name in BASE),
                *(
                    mean_text([run["alignment"][name] for run in of], 3)
                    for name in ("value", "permuted", "p_value")
                ),
            )
            for (share,), of in arms
        ]
        losses = (f"{name} loss" for name in BASE)
        head = (category, "seeds", *losses, "alignment", "permuted", "p")
        lines += [*markdown_table(head, rows), ""]
    return "\n".join(lines)


def _rate(runs: list[Result], kind: str, condition: str) -> str:
    """Format a rate of right answers.

    A single seed's rate has its 95 % interval; the mean over several seeds has its standard error.
    """
    found = [run["answers"][kind][condition] for run in runs]
    if len(found) > 1:
        return mean_text([rate for rate, _, _ in found], 3)
    [(rate, low, high)] = found
    return f"{rate:.3f} [{low:.2f}, {high:.2f}]"


def command() -> None:
    run_command(main, VisualPriors)


if __name__ == "__main__":
    command()
