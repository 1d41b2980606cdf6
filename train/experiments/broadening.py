"""Simulate why more rollouts per problem help (BroRL), on a policy that chooses a single token.

python -m train.experiments.broadening --out broadening.jsonl --figure broadening.png
python -m train.experiments.broadening --report broadening.jsonl --figure broadening.png

The logits of the policy are trained with 4 to 5120 rollouts per step, for the same number of
optimizer steps in each run (`train.rl.learning.mass_balance.simulate`). More rollouts per step move
more probability to the correct tokens. With many rollouts no correct token loses probability, since
the unsampled coupling, the third term of the mass balance, vanishes. The experiment takes seconds
on a CPU.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.cli.command import run_command
from train.cli.figures import check_figure
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    differing,
    markdown_table,
    mean_text,
    read_results,
    run_study,
    seeds_text,
    settings_text,
)
from train.rl.learning.mass_balance import mass_balance, simulate, unsampled_mass

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = ("tokens", "correct", "steps")
POINTS = 20  # number of points of a curve in the results, after the first point at step 0
RATES = (0.001, 0.01, 0.1)  # token probabilities for the figure's panel of unsampled mass
CHOICE = (0.5, 0.0, -0.3, 1.0, 0.2, -0.5)  # logits for the panel of terms; first half correct
BATCHES = 400  # number of batches of rollouts over which the terms are averaged


@dataclasses.dataclass(frozen=True)
class Broadening(StudyConfig):
    """Simulates training with several numbers of rollouts, or reports stored simulations.

    Attributes:
        rollouts: Numbers of rollouts per step (N) to compare.
        tokens: Number of tokens to choose from.
        correct: Number of correct tokens.
        steps: Number of optimizer steps.
        figure: File for the curves, as .png, .pdf or .svg (needs matplotlib); none by default.
    """

    rollouts: tuple[int, ...] = (4, 16, 64, 512, 5120)
    tokens: int = 2000
    correct: int = 160
    steps: int = 300
    out: str = "broadening.jsonl"
    figure: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.correct >= self.tokens:
            raise ValueError(f"correct={self.correct} of tokens={self.tokens}: choose it smaller")
        if not self.rollouts:
            raise ValueError("no rollouts: choose numbers of 1 or more")


def main(config: Broadening) -> None:
    """Run the missing simulations, or print the table; draw the figure if a file is given."""
    if config.figure:
        check_figure(Path(config.figure))
    run_study(config, ("rollouts", "seed", *SIZES), simulate_missing, report)
    if config.figure:
        figure = draw(read_results(config.report or config.out))
        figure.savefig(config.figure, dpi=150)
        print(f"figure: {Path(config.figure).absolute()}")


def simulate_missing(config: Broadening, results: Results) -> Iterator[tuple[Result, str]]:
    """Run the simulations that `results` lacks; yield the result of each with a line to print."""
    sizes = {name: getattr(config, name) for name in SIZES}
    runs = (
        {"rollouts": count, "seed": seed, **sizes}
        for count in config.rollouts
        for seed in config.seeds
    )
    for run in results.missing(runs):
        found = simulate(run["rollouts"], run["seed"], **sizes)
        points = np.linspace(0, config.steps, POINTS + 1).round().astype(int)
        result = run | {
            "before": found.correct_mass[0],
            "after": found.correct_mass[-1],
            "worst": found.worst,
            "improved": found.improved,
            "curve": [[int(point), found.correct_mass[point]] for point in points],
        }
        yield (
            result,
            f"{run['rollouts']} rollouts seed {run['seed']}: correct mass "
            f"{result['before']:.3f} -> {result['after']:.3f}, worst change {found.worst:.2e}",
        )


def report(results: list[Result]) -> str:
    """Format a Markdown table with a row for each number of rollouts.

    Simulations that differ in an option of `SIZES` have separate rows, which name the option.
    Cells are means over seeds ± standard errors, except the worst change, a minimum over seeds.
    """
    rows, differ = [], differing(results, SIZES)
    for (count, *_), of_count in by_key(results, "rollouts", *differ).items():
        column = lambda name, of_count=of_count: [result[name] for result in of_count]  # noqa: E731
        rows.append(
            [
                f"{count}{settings_text(of_count[0], differ)}",
                mean_text(column("before"), 3),
                mean_text(column("after"), 3),
                f"{min(column('worst')):.2e}",
                mean_text([100 * share for share in column("improved")], 1),
                seeds_text(of_count),
            ]
        )
    head = [
        "rollouts a step", "correct mass before", "after", "worst change of a correct token",
        "correct tokens that rose, %", "seeds",
    ]  # fmt: skip
    return "\n".join(markdown_table(head, rows))


def expected_terms(count: int, seed: int = 0) -> np.ndarray:
    """Estimate the expected terms `[3]` of the mass balance for the logits `CHOICE`.

    Args:
        count: Number of rollouts per batch (N); the terms are averaged over `BATCHES` batches.
        seed: Seed of the rollouts.
    """
    logits = np.array(CHOICE)
    correct = np.arange(len(logits)) < len(logits) // 2
    p = np.exp(logits) / np.exp(logits).sum()
    batches = np.random.default_rng(seed).multinomial(count, p, BATCHES) > 0
    return np.mean([mass_balance(logits, correct, drawn).terms for drawn in batches], axis=0)


def draw(results: Sequence[Result]) -> "Figure":
    """Draw three panels: training curves, unsampled mass, and terms of the mass balance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    training, unsampled, terms = figure.subplots(1, 3)
    differ = differing(results, SIZES)
    for (count, *_), of_count in by_key(results, "rollouts", *differ).items():
        curves = np.array([result["curve"] for result in of_count])
        label = f"N = {count}{settings_text(of_count[0], differ)}"
        training.plot(curves[0, :, 0], curves[:, :, 1].mean(axis=0), label=label)
    training.set(xlabel="optimizer step", ylabel="probability of a correct token")
    counts = np.unique(np.geomspace(1, 512, 40).round().astype(int))
    for rate in RATES:
        unsampled.loglog(counts, unsampled_mass(rate, counts), label=f"p = {rate}")
    unsampled.set(
        xlabel="rollouts N", ylabel="p² (1 - p)^N, of a token never drawn", ylim=(1e-9, 1)
    )
    found = np.array([expected_terms(count) for count in counts])
    for name, term in zip(("sampled correct", "sampled wrong", "unsampled"), found.T, strict=True):
        terms.semilogx(counts, term, label=name)
    terms.set(xlabel="rollouts N", ylabel="mean term of the mass balance")
    for panel in (training, unsampled, terms):
        panel.legend(fontsize=8)
    return figure


def command() -> None:
    run_command(main, Broadening)


if __name__ == "__main__":
    command()
