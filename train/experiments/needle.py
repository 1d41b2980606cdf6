"""Compare tree search with plain sampling at equal numbers of tokens: planted needles, and sums.

python -m train.experiments.needle --out needle.jsonl --figure tree.png
python -m train.experiments.needle --report needle.jsonl

A needle is one letter of a response that the policy writes with a known small probability, and that
alone makes the response right. The needle is in the last node of a path of the search tree (task
"late"), in the middle ("middle") or in the first node ("early"). A small byte-level decoder is
trained on responses that are sampled with this probability. Cases are problems that 8 plain samples
fail to solve. Each case is searched once, and then plainly sampled for about as many tokens.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles
from train.benchmarks.timing import Clock, Cost
from train.cli.command import run_command
from train.cli.figures import check_figure
from train.data import ByteTokenizer
from train.engine.optim import OptimizerConfig
from train.experiments.reinforce import demonstrate
from train.experiments.study import (
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
from train.models.load import LanguageModel
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.sampler import Sampler
from train.rl.rollout.search import TreeSearch
from train.rl.rollout.searching import Search, Searcher
from train.rl.rollout.strategies import OneResponse
from train.rl.rollout.tree_export import draw_tree, tree_json
from train.rl.tasks.arithmetic import Arithmetic
from train.rl.types import Completion, Problem, Reward

MODEL = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256
)
LETTERS, STEP_LEN = 24, 4  # tokens of a response with its stop id, and tokens of a node
DEMONSTRATED = 10**6  # first index of the training problems that are demonstrated
SIZES = ("problems", "supervised", "stretch")
SAMPLES = 8  # plain samples of each problem; none of them solves a case


@dataclasses.dataclass(frozen=True)
class Needle:
    """Task whose responses are letters a and b, with z (right) or y (wrong) at one position.

    Attributes:
        at: Index of the letter that is z or y.
        rate: Probability of z in demonstrations.
        length: Number of letters per response.
    """

    at: int
    rate: float
    length: int

    name = "needle"
    sizes: Any = dataclasses.field(default_factory=lambda: {"train": None, "test": None})

    def problem(self, split: str, index: int) -> Problem:
        rng = np.random.default_rng([index, split == "test"])
        letters = rng.choice(list("ab"), self.length)
        letters[self.at] = "z" if rng.random() < self.rate else "y"
        return Problem(f"{split}{index}", f"{index % 100:02}:", "".join(letters))

    def score(self, completion: Completion) -> Reward:
        found = completion.text[self.at : self.at + 1] == "z"
        return Reward(float(found), found)


def late(stretch: int) -> tuple[Any, int, int]:
    """Return task, response length and node length (`TASKS`), with the needle in the last node."""
    letters = LETTERS * stretch - 1
    return Needle(letters - 2, 1 / 16, letters), letters + 1, STEP_LEN * stretch


def middle(stretch: int) -> tuple[Any, int, int]:
    """Return task, response length and node length (`TASKS`), with the needle in the middle."""
    letters = LETTERS * stretch - 1
    return Needle(letters // 2, 1 / 16, letters), letters + 1, STEP_LEN * stretch


def early(stretch: int) -> tuple[Any, int, int]:
    """Return task, response length and node length (`TASKS`), with the needle in the first node."""
    letters = LETTERS * stretch - 1
    return Needle(1, 1 / 16, letters), letters + 1, STEP_LEN * stretch


def sums(stretch: int) -> tuple[Any, int, int]:
    """Return task, response length and node length (`TASKS`) of sums, a task without a needle."""
    digits = 2 * stretch
    return Arithmetic(seed=0, digits=digits), digits + 2, stretch


TASKS: dict[str, Callable[[int], tuple[Any, int, int]]] = {
    "late": late,
    "middle": middle,
    "early": early,
    "sums": sums,
}
"""Mapping from a name to a function of `stretch`, the factor on all lengths. The function returns
the task, the number of tokens of the longest response, and the number of tokens of a node."""


@dataclasses.dataclass(frozen=True)
class Experiment(StudyConfig):
    """Compares tree search with plain sampling on each task, or reports stored results.

    Attributes:
        tasks: Names of the tasks: "late", "middle", "early" (planted needles) or "sums".
        problems: Number of problems; only problems that 8 samples fail to solve are searched.
        supervised: Number of optimizer steps on demonstrations.
        stretch: Factor on the length of responses (24 tokens, or sums of numbers of 2 digits) and
            of nodes (4 tokens, or 1 token for sums). The search copies cached state once per node.
        figure: File for a drawing of a search tree that found a solution, as .png, .pdf or .svg
            (needs matplotlib); a later run with such a tree overwrites the file. None by default.
    """

    tasks: tuple[str, ...] = ("late", "middle", "early", "sums")
    problems: int = 128
    supervised: int = 300
    stretch: int = 1
    out: str = "needle.jsonl"
    figure: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_names("task", self.tasks, TASKS)
        for name in self.tasks:
            try:
                TASKS[name](self.stretch)
            except ValueError as error:
                raise ValueError(f"stretch={self.stretch} of task {name}: {error}") from error


def main(config: Experiment) -> None:
    """Make the comparisons that the file of results lacks, or print the table."""
    if config.figure:
        check_figure(Path(config.figure))
    run_study(config, ("task", "seed", *SIZES), search_missing, report)


def search_missing(config: Experiment, results: Results) -> Iterator[tuple[Result, str]]:
    """Make the comparisons that `results` lacks, and yield each result with a line to print."""
    sizes = {name: getattr(config, name) for name in SIZES}
    runs = ({"task": name, "seed": seed, **sizes} for name in config.tasks for seed in config.seeds)
    for run in results.missing(runs):
        found, trees = compare(run["task"], run["seed"], **sizes)
        if config.figure and trees:
            draw_tree(trees[0]).savefig(config.figure, dpi=150)
            print(f"figure: {Path(config.figure).absolute()}")
        yield (
            run | found,
            f"{run['task']} seed {run['seed']}: {found['cases']} cases, search found "
            f"{found['search']:.1%}, plain sampling {found['plain']:.1%} at equal tokens",
        )


def compare(
    name: str, seed: int, problems: int, supervised: int, stretch: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare tree search with plain sampling on a task's cases, the problems that samples miss.

    Args:
        name: Name of the task in `TASKS`.
        seed: Seed of parameters and of sampling.
        problems: Number of problems among which cases are found.
        supervised: Number of optimizer steps on demonstrations.
        stretch: Factor on the lengths of responses and nodes.

    Returns:
        Entries of a result (fractions of cases that were solved, tokens and throughput), and the
        search trees that found a solution as JSON-serializable dicts.

    Raises:
        ValueError: Samples solve all problems.
    """
    task, longest, step_len = TASKS[name](stretch)
    with tempfile.TemporaryDirectory() as folder:
        job, sampler = policy_of(task, seed, longest, supervised, folder)
    form = PromptFormatter(job.lm)
    direct = OneResponse(formatter=form, max_new_tokens=longest)
    strategy = TreeSearch(step_len=step_len, probe=0, formatter=form, max_new_tokens=longest)
    every = [task.problem("train", index) for index in range(problems)]
    rows = direct.collect(sampler, task, every, [SAMPLES] * problems, (seed, 0))
    solved = {row.group for row in rows if row.reward.success}
    cases = [problem for at, problem in enumerate(every) if at not in solved]
    if not cases:
        raise ValueError(f"{name}: {SAMPLES} samples miss none of {problems} problems: take more")

    def search(key: int) -> tuple[Searcher, list[Search], Cost]:
        searcher = Searcher(sampler, form, task, strategy, strategy.limits, (seed, key))
        clock = Clock()
        made = searcher.run(range(len(cases)), cases, [SAMPLES] * len(cases))
        return searcher, made, clock.read()

    search(1)  # compiles
    searcher, searches, cost = search(2)
    spent = [sum(len(node.chunk.log_probs) for node in s.tree.nodes) for s in searches]
    mean = float(np.mean([row.num_generated for row in rows]))
    counts = [int(np.ceil(tokens / mean)) for tokens in spent]
    batch = min(sampler.max_rows, len(cases) * strategy.width)  # that of searches
    sampler = Sampler(sampler.policy, sampler.sampling, batch, job.trainable.mesh)
    direct.collect(sampler, task, cases, counts, (seed, 3))  # compiles
    before, clock = sampler.generated, Clock()
    plain = direct.collect(sampler, task, cases, counts, (seed, 4))
    plain_cost, plain_tokens = clock.read(), sampler.generated - before
    by_plain = {row.group for row in plain if row.reward.success}
    trees = [tree_json(one, form) for one in searches if one.tree.solved]
    counted = searcher.counts
    return {
        "cases": len(cases),
        "sampled": float(np.mean([row.reward.success for row in rows])),
        "search": len(trees) / len(cases),
        "plain": len(by_plain) / len(cases),
        "tokens": float(np.mean(spent)),
        "plain_tokens": plain_tokens / len(cases),
        "terminals": float(np.mean([sum(n.terminal for n in s.tree.nodes) for s in searches])),
        "plain_samples": float(np.mean(counts)),
        "generation_share": counted["generation_seconds"] / cost.seconds,
        "search_tokens_per_second": counted["tokens"] / cost.seconds,
        "plain_tokens_per_second": plain_tokens / plain_cost.seconds,
        "search_tokens_per_cpu_second": counted["tokens"] / cost.cpu_seconds,
        "plain_tokens_per_cpu_second": plain_tokens / plain_cost.cpu_seconds,
        "reused_tokens": counted["reused_tokens"],
        "prefilled_tokens": counted["prefilled_tokens"],
    }, trees


def policy_of(
    task: Any, seed: int, longest: int, supervised: int, folder: str
) -> tuple[RLJob, Sampler]:
    """Train a decoder on a task's demonstrations; return its job and a sampler from the decoder."""
    config = RLConfig(
        weights="demonstrations", train="all", method="deepsearch(probe=0)", steps=supervised,
        max_new_tokens=longest, max_rows=512, seed=seed, out=folder,
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.1),
    )  # fmt: skip
    lm = LanguageModel(Thoughtbubbles(MODEL, rngs=nnx.Rngs(seed)), ByteTokenizer())
    job = RLJob(config, lm, task)
    shown = [task.problem("train", DEMONSTRATED + index) for index in range(4096)]
    state = next(itertools.islice(demonstrate(job, shown, 128), supervised - 1, None))
    return job, job.sampler(state.variables)


def report(results: list[Result]) -> str:
    """Format a Markdown table with a row for each task and `stretch`, and with means over seeds.

    Results that differ in `problems` or `supervised` have separate rows, which name the option.
    """
    rows, differ = [], differing(results, ("problems", "supervised"))
    for (name, stretch, *_), of_task in by_key(results, "task", "stretch", *differ).items():
        column = lambda key, scale=1.0, of_task=of_task: [scale * r[key] for r in of_task]  # noqa: E731
        speed = [
            [r[f"search_tokens_per_{unit}"] / r[f"plain_tokens_per_{unit}"] for r in of_task]
            for unit in ("second", "cpu_second")
            if all(f"plain_tokens_per_{unit}" in r for r in of_task)
        ]
        rows.append(
            [
                f"{name}{settings_text(of_task[0], differ)}",
                str(stretch),
                str(sum(column("cases"), 0)).partition(".")[0],
                mean_text(column("sampled", 100), 1),
                mean_text(column("search", 100), 1),
                mean_text(column("plain", 100), 1),
                mean_text(column("tokens"), 0),
                mean_text(column("plain_tokens"), 0),
                mean_text(column("terminals"), 0),
                mean_text(column("plain_samples"), 0),
                mean_text(column("generation_share", 100), 0),
                ", ".join(mean_text(of_unit, 2) for of_unit in speed),
                seeds_text(of_task),
            ]
        )
    head = [
        "task", "stretch", "cases", "a sample is right, %", "search finds, %", "plain finds, %",
        "tokens of search", "of plain", "terminals", "samples", "time in generation, %",
        "tokens a second over plain's, tokens a CPU second", "seeds",
    ]  # fmt: skip
    return "\n".join(markdown_table(head, rows))


def command() -> None:
    run_command(main, Experiment)


if __name__ == "__main__":
    command()
