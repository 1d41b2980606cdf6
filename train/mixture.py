"""Find mixture weights of text sources for wanted label fractions, and measure the labeller.

python -m train.mixture --sources stdlib ~/texts --shares reasoning=0.6 visual=0.15
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Mapping
from pathlib import Path

from train.cli.command import run_command
from train.data import DataConfig, DataError, open_corpus
from train.data.labels import (
    RULES,
    SEGMENT,
    Classifier,
    Segment,
    by_rules,
    divided,
    read_labelled,
    score,
    segments,
    standard_library_segments,
)
from train.data.shares import Solution, check_wanted, solve_weights


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Label segments of text sources, and find mixture weights for wanted label fractions.

    Attributes:
        sources: Sources of text, as in --data.corpus; without sources, only the labeller is
            measured.
        shares: Wanted fractions of segments that have a label, each written as LABEL=SHARE.
        labelled: Labelled segments on which a classifier is trained and tested: a JSON Lines file
            of objects with "text" and "labels", or "stdlib" for code and prose of Python's standard
            library, separated by Python's tokenizer. By default, fixed rules label the segments.
        segments: Number of segments to label per source, from its first documents.
        validation: Fraction of the documents that is held out and therefore not labelled.
        cache_dir: Folder of prepared data; ${XDG_CACHE_HOME:-~/.cache}/thoughtbubbles/data by
            default.
    """

    sources: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    labelled: str | None = None
    segments: int = 500
    validation: float = DataConfig.validation
    cache_dir: str | None = None

    def __post_init__(self):
        if self.segments < 1:
            raise ValueError(f"segments={self.segments} is below 1")
        if not self.sources and self.labelled is None:
            raise ValueError("nothing to do: name --sources to label, or --labelled segments")
        labels = [share.partition("=")[0] for share in self.shares]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"shares name {label} twice: give each label one share")
        if self.shares and not self.sources:
            raise ValueError(f"shares of {self.shares[0]}: name the --sources to mix")


def main(config: MixtureConfig) -> None:
    """Print the classifier's accuracy, each source's label fractions, and the mixture weights."""
    wanted = dict(map(_share, config.shares))
    classifier = None
    if config.labelled is not None:
        classifier = measured(config.labelled)
    if not config.sources:
        return
    labels = classifier.labels if classifier else tuple(RULES)
    if wanted:
        check_wanted(wanted, labels)
    judged = f"a classifier of {config.labelled}" if classifier else "rules, which are not measured"
    print(f"shares of labels in {config.segments} segments of each source, by {judged}:")
    matrix = {}
    for source in config.sources:
        data = DataConfig(source, validation=config.validation, cache_dir=config.cache_dir)
        documents = open_corpus(source, data.validation, data.cache).documents("train")
        texts = list(itertools.islice(segments(documents), config.segments))
        if not texts:
            raise DataError(f"{source} has fewer than {SEGMENT // 2} characters to label")
        found = [
            classifier(text) if classifier else {n for n in labels if by_rules(text, n)}
            for text in texts
        ]
        matrix[source] = {n: sum(n in of for of in found) / len(found) for n in labels}
        print(f"  {source}: {_listed(matrix[source])} ({len(texts)} segments)")
    if wanted:
        print(readable(solve_weights(matrix, wanted), wanted))


def measured(labelled: str, limit: int = 3000) -> Classifier:
    """Train a classifier on labelled segments, and print its accuracy on held-out segments.

    For comparison, the accuracies of the rules and of the majority answer are printed too.

    Args:
        labelled: JSON Lines file of segments, or "stdlib" for Python's standard library.
        limit: Maximum number of segments of the standard library.

    Raises:
        DataError: The file can't be read, or no segment has a label.
    """
    examples: list[Segment]
    is_own = labelled == "stdlib"
    examples = standard_library_segments(limit) if is_own else read_labelled(Path(labelled))
    labels = sorted({label for example in examples for label in example.labels})
    train, held_out = divided(examples)
    if not labels:
        raise DataError(f"{labelled} has no label: give segments that have some")
    classifier = Classifier(train, labels)
    given = [classifier(example.text) for example in held_out]
    print(f"labels of {len(held_out)} held-out segments, from {len(train)} others:")
    for label in labels:
        has = [label in example.labels for example in held_out]
        most = max(sum(has), len(has) - sum(has)) / len(has)
        ours = score([label in of for of in given], has)
        line = f"  {label}: classifier {ours.accuracy:.1%} right (F1 {ours.f1:.2f}), "
        if label in RULES:
            rules = score([by_rules(example.text, label) for example in held_out], has)
            line += f"rules {rules.accuracy:.1%} (F1 {rules.f1:.2f}), "
        print(f"{line}the more frequent answer {most:.1%}")
    return classifier


def readable(solution: Solution, wanted: Mapping[str, float]) -> str:
    """Format mixture weights as a `--data.corpus` option, with the label fractions they reach.

    Args:
        solution: Mixture weights, and the label fractions that they reach.
        wanted: Mapping from a label to its wanted fraction.
    """
    weights = {name: round(weight, 4) for name, weight in solution.weights.items()}
    weights = {name: weight for name, weight in weights.items() if weight}
    largest = max(weights, key=weights.__getitem__)
    weights[largest] = round(weights[largest] + 1 - sum(weights.values()), 4)
    shares = {label: solution.shares[label] for label in wanted}
    hit = "hits" if solution.distance < 5e-4 else f"misses by up to {solution.distance:.1%}"
    return (
        f"wanted {_listed(wanted)}; the nearest mixture has {_listed(shares)}: it {hit}\n"
        f"--data.corpus {shlex.quote(_corpus(weights))}"
    )


def _corpus(weights: Mapping[str, float]) -> str:
    quoted = {name: repr(name) if '"' in name or "\\" in name else f'"{name}"' for name in weights}
    written = ", ".join(f"{quoted[name]}: {weight!r}" for name, weight in weights.items())
    return f"mix({{{written}}})"


def _share(text: str) -> tuple[str, float]:
    label, _, share = text.partition("=")
    try:
        return label, float(share)
    except ValueError:
        raise ValueError(f"shares {text!r}: write LABEL=SHARE, as reasoning=0.6") from None


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {share:.1%}" for label, share in shares.items())


def command() -> None:
    run_command(main, MixtureConfig)


if __name__ == "__main__":
    command()
