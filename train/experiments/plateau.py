"""Compare more rollouts per problem (BroRL) with more steps, once training has reached a plateau.

python -m train.experiments.plateau --out plateau.jsonl
python -m train.experiments.plateau --report plateau.jsonl

The arm "flat" trains the baseline decoder of `reinforce` with BroRL and few rollouts per problem,
for so many steps that held-out success hardly rises any more. Two arms continue from the end of
"flat" and learn from equally many rollouts: "longer" keeps the number of rollouts per problem, and
"broader" uses many rollouts per problem in fewer steps. (Dynamic sampling generates more rollouts
than the arms learn from; the table counts all generated rollouts.)
Each finished run (arm and seed) is one line of the file; a second call trains only missing runs.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.engine.optim import OptimizerConfig
from train.experiments import reinforce
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    check_finished,
    check_names,
    markdown_table,
    mean_text,
    run_study,
    seeds_text,
)
from train.models.load import load_language_model
from train.rl.job import RLJob
from train.rl.loop import train
from train.runs.metrics import read_metrics

FLAT, LONGER, BROADER = "flat", "longer", "broader"
SIZES = ("task", "steps", "more", "few", "many", "batch_size", "minibatches", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Plateau(StudyConfig):
    """Compares more steps with more rollouts per problem in fewer steps, or reports stored results.

    Attributes:
        task: Name of the task of `experiment reinforce`: "reverse", "sort", "mixed", "facts".
        steps: Number of steps of the arm "flat", enough for success to reach a plateau.
        more: Number of further steps of the arm "longer", a multiple of `many` / `few`.
        few: Number of rollouts per problem in the arms "flat" and "longer".
        many: Number of rollouts per problem in the arm "broader", a multiple of `few`; this arm
            takes `more` * `few` / `many` steps.
        batch_size: Number of problems in a step.
        minibatches: Number of optimizer steps on the rollouts of a step, in all arms.
        learning_rate: Constant learning rate with `few` rollouts; the arm "broader" multiplies this
            rate by the square root of `many` / `few`.
        rows: Number of held-out problems, which are never trained on.
    """

    task: str = "mixed"
    steps: int = 96
    more: int = 64
    few: int = 16
    many: int = 256
    batch_size: int = 16
    minibatches: int = 4
    learning_rate: float = 3e-4
    rows: int = 512
    out: str = "plateau.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("task", (self.task,), reinforce.TASKS)
        if self.many % self.few or self.more % (self.many // self.few):
            raise ValueError(
                f"few={self.few}, many={self.many}, more={self.more}: choose many as a multiple of "
                "few and more as one of many / few, so that both arms have equally many rollouts"
            )


def main(config: Plateau) -> None:
    """Train the runs that the file of results lacks, or print the tables."""
    run_study(config, ("arm", "seed", *SIZES), train_missing, report, ("rows",))


def train_missing(config: Plateau, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    The arms "longer" and "broader" of a seed start from the final parameters of the arm "flat".
    """
    sizes = {name: getattr(config, name) for name in SIZES}
    steps = {LONGER: config.more, BROADER: config.more * config.few // config.many}
    for seed in config.seeds:
        runs = results.missing({"arm": arm, "seed": seed, **sizes} for arm in (FLAT, *steps))
        if not runs:
            continue
        common = reinforce.Experiment(
            learning_rate=config.learning_rate, batch_size=config.batch_size, rows=config.rows
        )
        baseline = reinforce.Baseline(common, config.task, seed)
        with tempfile.TemporaryDirectory() as folder:
            found = _train(config, baseline, config.steps, config.few, folder)
            flat = found["after"]
            baseline.lm = load_language_model(folder)
        for run in runs:
            if run["arm"] != FLAT:
                many = config.few if run["arm"] == LONGER else config.many
                with tempfile.TemporaryDirectory() as folder:
                    found = _train(config, baseline, steps[run["arm"]], many, folder)
            before = baseline.success if run["arm"] == FLAT else flat
            yield (
                run | found | {"before": before},
                f"{run['arm']} seed {seed}: {before:.1%} -> {found['after']:.1%}, "
                f"{found['rollouts']:,} rollouts, {found['cpu_seconds']:.0f} CPU seconds",
            )


def _train(
    config: Plateau, baseline: reinforce.Baseline, steps: int, rollouts: int, folder: str
) -> dict[str, Any]:
    """Train the decoder `baseline.lm` with BroRL; `folder` becomes the run folder.

    Returns:
        Held-out success `after`, the entries of `reinforce.of_a_run`, the number of optimizer steps
        as `updates`, `scaled_learning_rate`, `seconds`, `cpu_seconds` and the version of `jax`.
    """
    clock = Clock()
    base = config.batch_size * config.few
    run = baseline.rl(
        folder,
        method=f"brorl(num_generations={rollouts}, base_rollouts={base})",
        steps=steps,
        minibatches=config.minibatches,
        save_every=steps,
        optimizer=OptimizerConfig(
            learning_rate=config.learning_rate, weight_decay=0.0, final_ratio=1.0, warmup=0.0
        ),
    )
    after = train(RLJob(run, baseline.lm, baseline.task))["success"]
    check_finished(folder, steps)
    cost, lines = clock.read(), read_metrics(folder)
    learned = sum("grad_norm" in line for line in lines)  # some steps may find nothing to learn
    return {
        "after": after,
        **reinforce.of_a_run(lines),
        "updates": learned * config.minibatches,
        "scaled_learning_rate": run.scaled_optimizer.learning_rate,
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "jax": jax.__version__,
    }


def report(results: list[Result]) -> str:
    """Format a Markdown table for each combination of the options `SIZES`.

    Cells are means over seeds. Success is the percentage of held-out problems that are solved, with
    its standard error over seeds.
    """
    head = "arm, seeds, before, after, gained, rollouts, tokens, optimizer steps, CPU-seconds"
    lines = []
    for sizes, of_setting in by_key(results, *SIZES).items():
        shown = ", ".join(f"{name} {size}" for name, size in zip(SIZES, sizes, strict=True))
        lines += [f"{shown}; held-out success in percent", ""]
        rows = []
        for (arm,), runs in by_key(of_setting, "arm").items():
            means = ("rollouts", "tokens", "updates", "cpu_seconds")
            rows.append(
                (
                    arm,
                    seeds_text(runs),
                    mean_text([100 * run["before"] for run in runs], 1),
                    mean_text([100 * run["after"] for run in runs], 1),
                    mean_text([100 * (run["after"] - run["before"]) for run in runs], 1, "+"),
                    *(f"{np.mean([run[name] for run in runs]):,.0f}" for name in means),
                )
            )
        lines += [*markdown_table(head.split(", "), rows), ""]
    return "\n".join(lines)


def command() -> None:
    run_command(main, Plateau)


if __name__ == "__main__":
    command()
