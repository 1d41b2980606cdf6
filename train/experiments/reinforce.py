"""Measure held-out success before and after reinforcement learning, and of controls.

python -m train.experiments.reinforce --out reinforce.jsonl
python -m train.experiments.reinforce --report reinforce.jsonl
python -m train.experiments.reinforce --tasks mixed --arms knapsack "knapsack(low=8, high=8)"

A small byte-level decoder, the baseline, is trained on demonstrations of a task until it solves
some problems. Each arm trains the baseline further: a method of `train.rl` on problems without
demonstrations, or a control (GRPO with random rewards, or as many more steps on demonstrations).
Each finished run (task, arm and seed) is one line of the file; a second call trains missing runs.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data import ByteTokenizer
from train.devices.mesh import place
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import TrainState
from train.engine.step import make_train_step
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    check_finished,
    check_names,
    markdown_table,
    mean_or_none,
    mean_text,
    run_study,
    seeds_text,
)
from train.models.load import LanguageModel
from train.rl.buckets import SHORTEST, bucket
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.learning.policy import token_scores
from train.rl.loop import train
from train.rl.methods import METHODS
from train.rl.named_tasks import make_task
from train.rl.parts import part_from_text
from train.rl.protocols import Task
from train.rl.types import Completion, Problem, Reward
from train.runs.metrics import read_metrics

# First indices of training problems for demonstrations and for validation; rollouts begin at 0.
DEMONSTRATED, VALIDATION = 10**6, 2 * 10**6
CHECK_EVERY = 10  # supervised steps between validations
ROWS = 128  # number of rows in a supervised step
MODEL = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256
)


@dataclasses.dataclass(frozen=True)
class TaskSetup:
    """A task, and the supervised training of its baseline.

    Attributes:
        task: Name of a task of `train.rl.tasks` with its options.
        demonstrations: Number of problems with answers that supervised training samples from.
        enough: Fraction of solved validation problems at which supervised training ends.
        steps: Maximum number of supervised optimizer steps.
        max_new_tokens: Number of tokens of the longest answer with its stop id.
        pool: Number of training problems of reinforcement learning; None for no limit.
        abstained: Expected fraction of demonstrations that abstain, so that rollouts abstain too.
    """

    task: str
    demonstrations: int
    enough: float
    steps: int
    max_new_tokens: int
    pool: int | None = None
    abstained: float = 0.0


TASKS = {
    "reverse": TaskSetup("reverse(length=5, shortest=3)", 200, 0.4, 300, 6),
    "sort": TaskSetup("sort(length=5, shortest=3)", 200, 0.4, 300, 6),
    # Some problems are always solved and some never.
    "mixed": TaskSetup("reverse(length=8)", 400, 0.35, 300, 9, pool=256),
    # Half of the questions ask for a fact that is not stated; an answer to them is a guess.
    "facts": TaskSetup("hidden_facts(facts=2, values=5)", 4000, 0.4, 600, 2, abstained=0.1),
}
CONTROLS = ("coin", "demonstrations")


@dataclasses.dataclass(frozen=True)
class Experiment(StudyConfig):
    """Trains and scores each arm on each task, or reports stored results.

    Attributes:
        tasks: Names of the tasks: "reverse", "sort", "mixed", "facts".
        arms: Methods of `train.rl` with their options, or controls: "coin" is GRPO with rewards
            that do not depend on the answer, "demonstrations" is more supervised training.
        pretrain_steps: Maximum number of supervised steps of the baseline; 0 for the task's number.
        steps: Number of steps of each arm after the baseline.
        batch_size: Number of problems in a step.
        num_generations: Number of answers to each problem, except for methods that set their own
            number, such as brorl. A step on demonstrations has as many rows as grpo has answers.
        learning_rate: Peak learning rate of each arm; the method brorl scales this rate.
        rows: Number of held-out problems, which are never trained on.
    """

    tasks: tuple[str, ...] = ("reverse", "sort")
    arms: tuple[str, ...] = ("grpo", *CONTROLS)
    pretrain_steps: int = 0
    steps: int = 200
    batch_size: int = 32
    num_generations: int = 8
    learning_rate: float = 1e-3
    rows: int = 1024
    out: str = "reinforce.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("task", self.tasks, TASKS)
        for arm in self.arms:
            if arm.partition("(")[0] in METHODS:
                part_from_text("method", arm)
            else:
                check_names("arm", (arm,), (*METHODS, *CONTROLS))


class ValidationTask:
    """Task whose test split consists of training problems, for early stopping of the baseline."""

    def __init__(self, task: Task):
        self._task = task
        self.name, self.sizes, self.score = task.name, task.sizes, task.score

    def problem(self, split: Any, index: int) -> Problem:
        return self._task.problem("train", index + VALIDATION * (split == "test"))


class Coin:
    """Control task with random rewards, 1 with probability `share`; `success` is that of `task`."""

    def __init__(self, task: Task, share: float, seed: int):
        self._task, self._share = task, share
        self._rng = np.random.default_rng([seed, 2])
        self.name, self.sizes = f"{task.name}, paid by a coin", task.sizes

    def problem(self, split: Any, index: int) -> Problem:
        return self._task.problem(split, index)

    def score(self, completion: Completion) -> Reward:
        success = self._task.score(completion).success
        return Reward(float(self._rng.random() < self._share), success)


def main(config: Experiment) -> None:
    """Train the runs that the file of results lacks, or print the table."""
    settings = (
        "pretrain_steps", "steps", "batch_size", "num_generations", "learning_rate", "rows",
    )  # fmt: skip
    run_study(config, ("task", "arm", "seed"), train_missing, report, settings)


def train_missing(config: Experiment, results: Results) -> Iterator[tuple[Result, str]]:
    """Train and yield the missing runs; all arms of a task and seed start from one baseline."""
    for name, seed in itertools.product(config.tasks, config.seeds):
        runs = results.missing({"task": name, "seed": seed, "arm": arm} for arm in config.arms)
        if not runs:
            continue
        baseline = Baseline(config, name, seed)
        print(f"{name} seed {seed}: baseline {baseline.success:.1%}", flush=True)
        for run in runs:
            result = run | score_arm(baseline, run["arm"])
            line = f"{name} {run['arm']} seed {seed}: {result['before']:.1%} -> "
            yield result, f"{line}{result['after']:.1%}, {result['seconds']:.0f} s"


class Baseline:
    """A decoder trained on demonstrations, from which all arms of a task and seed start.

    Args:
        config: Options of the experiment.
        name: Name of the task in `TASKS`.
        seed: Seed of parameters, problems, demonstrations and rollouts.

    Attributes:
        lm: The trained decoder, after `steps` supervised steps that took the time `cost`.
        success: Fraction of held-out problems that the decoder solves.
    """

    def __init__(self, config: Experiment, name: str, seed: int):
        clock = Clock()
        self.config, self.setup, self.seed = config, TASKS[name], seed
        self.task: Any = make_task(self.setup.task, seed)
        most = config.pretrain_steps or self.setup.steps
        optimizer = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1)
        self.lm = LanguageModel(Thoughtbubbles(MODEL, rngs=nnx.Rngs(seed)), ByteTokenizer())
        with tempfile.TemporaryDirectory() as folder:
            run = self.rl(folder, steps=most, optimizer=optimizer)
            job = RLJob(run, self.lm, ValidationTask(self.task))
            shown = demonstrate(job, self.demonstrations(), ROWS)
            for self.steps, state in enumerate(itertools.islice(shown, most), 1):
                if self.steps % CHECK_EVERY == 0 or self.steps == most:
                    success = job.evaluate(state.variables)[0]["success"]
                    if success >= self.setup.enough:
                        break
            self.lm = LanguageModel(
                job.trainable.model(state.variables).backbone.model, ByteTokenizer()
            )
            job = RLJob(self.rl(folder), self.lm, self.task)
            self.success = job.evaluate(job.first_state().variables)[0]["success"]
        self.cost = clock.read()

    def demonstrations(self) -> list[Problem]:
        """Return the demonstrated training problems; a few answers are replaced by abstentions."""
        count, rng = self.setup.demonstrations, np.random.default_rng([self.seed, 4])
        shown = [self.task.problem("train", DEMONSTRATED + i) for i in range(count)]
        for i in np.flatnonzero(rng.random(count) < self.setup.abstained):
            shown[i] = dataclasses.replace(shown[i], answer=self.task.unknown)
        return shown

    def rl(self, folder: str, **changes: Any) -> RLConfig:
        """Return the config of reinforcement learning in `folder`, with `changes` applied."""
        config = self.config
        method = part_from_text("method", changes.pop("method", "grpo"))
        own = method.num_generations is not None
        base = RLConfig(
            weights="demonstrations",
            train="all",
            method=method,
            task=self.setup.task,
            steps=config.steps,
            batch_size=config.batch_size,
            num_generations=None if own else config.num_generations,
            max_new_tokens=self.setup.max_new_tokens,
            pool=self.setup.pool,
            max_rows=1024,
            seed=self.seed,
            optimizer=OptimizerConfig(
                learning_rate=config.learning_rate, weight_decay=0.0, final_ratio=0.1
            ),
            evaluation=EvalConfig(every=max(config.steps // 4, 1), rows=config.rows),
            save_every=config.steps,
            log_every=1,
            out=folder,
        )
        return dataclasses.replace(base, **changes)


def demonstrate(job: RLJob, problems: Sequence[Problem], batch_size: int) -> Iterator[TrainState]:
    """Run supervised training on the answers of problems; yields states as `supervise` does."""
    return supervise(job, answered(job.lm, problems), batch_size)


def supervise(job: RLJob, rows: dict[str, np.ndarray], batch_size: int) -> Iterator[TrainState]:
    """Run supervised training without end; yields each step's state, which the next step donates.

    Args:
        job: Job whose initial parameters training starts from.
        rows: Arrays `tokens` `[N, L]` int32, `trained` (loss mask) `[N, L]` bool, `length` `[N]`.
        batch_size: Number of rows per step.
    """
    vocab_size = job.lm.tokenizer.vocab_size

    def loss(finetunable: Any, rows: dict[str, jax.Array], key: jax.Array) -> Any:
        del key
        return -token_scores(finetunable, rows, 1.0, vocab_size).sum(), rows["trained"].sum(), {}

    state, step = job.first_state(), make_train_step(job.trainable, 1, loss)
    for part in shuffled(rows, batch_size, job.config.seed):
        batch = {name: place(values, job.trainable.mesh) for name, values in part.items()}
        state, _ = step(state, batch)
        yield state


def answered(lm: LanguageModel, problems: Sequence[Problem]) -> dict[str, np.ndarray]:
    """Encode prompts with answers as rows for `supervise`, padded on the right with 0."""
    prompts = [lm.prompt(problem.prompt) for problem in problems]
    answers = [
        [*lm.tokenizer.encode(str(problem.answer))[0].tolist(), lm.stop_ids[0]]
        for problem in problems
    ]
    length = np.array([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], np.int32)
    tokens = np.zeros((len(problems), bucket(int(length.max()), SHORTEST)), np.int32)
    trained = np.zeros(tokens.shape, bool)
    for row, mask, prompt, answer in zip(tokens, trained, prompts, answers, strict=True):
        row[: len(prompt) + len(answer)] = prompt + answer
        mask[len(prompt) : len(prompt) + len(answer)] = True
    return {"tokens": tokens, "trained": trained, "length": length}


def shuffled(
    rows: dict[str, np.ndarray], batch_size: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches without end, each sampled from all rows with replacement."""
    rng = np.random.default_rng([seed, 3])
    while True:
        index = rng.integers(0, len(rows["length"]), batch_size)
        yield {name: values[index] for name, values in rows.items()}


def score_arm(baseline: Baseline, arm: str) -> dict[str, Any]:
    """Train one arm from the baseline, and score it on held-out problems.

    Returns:
        Held-out success `before` and `after`, the arm's options, `seconds` and `cpu_seconds`, steps
        and times of the baseline (`baseline_*`), and, except for the arm "demonstrations", the
        entries of `of_a_run`.
    """
    config, clock = baseline.config, Clock()
    method = "grpo" if arm in CONTROLS else arm
    task = Coin(baseline.task, baseline.success, baseline.seed) if arm == "coin" else baseline.task
    with tempfile.TemporaryDirectory() as folder:
        run = baseline.rl(folder, method=method)
        rows = run.rollouts
        job = RLJob(run, baseline.lm, task)
        if arm == "demonstrations":
            shown = demonstrate(job, baseline.demonstrations(), rows)
            state = next(itertools.islice(shown, config.steps - 1, None))
            found = {"after": job.evaluate(state.variables)[0]["success"]}
        else:
            held_out = train(job)
            check_finished(folder, config.steps)
            found = {"after": held_out["success"]} | of_a_run(read_metrics(folder))
    cost = clock.read()
    return {
        "before": baseline.success,
        **found,
        "rows": config.rows,
        "steps": config.steps,
        "updates": config.steps,
        "rows_per_update": rows,
        "learning_rate": run.scaled_optimizer.learning_rate,
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "baseline_steps": baseline.steps,
        "baseline_demonstrations": baseline.setup.demonstrations,
        "baseline_seconds": baseline.cost.seconds,
        "baseline_cpu_seconds": baseline.cost.cpu_seconds,
        "parameters": MODEL.num_params(),
        "spec": baseline.setup.task,
        "jax": jax.__version__,
    }


KEPT = (
    "reward", "success", "length", "mixed_groups", "mixed_rollouts", "clipped", "loss", "grad_norm",
)  # fmt: skip
OUTCOMES = ("accuracy", "uncertain", "hallucination", "truthfulness")


def of_a_run(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the logged metrics of a run, given as one dict for each step or evaluation.

    Returns:
        Sums `rollouts`, `tokens`, `rollout_seconds`, `update_seconds`; `held_out`, pairs of step
        and success; `outcomes`, a list over evaluations for each of `OUTCOMES` that is logged; and
        `tenths`, means of the metrics `KEPT` over parts of the run with a tenth of the steps each.
    """
    steps = [line for line in lines if "reward" in line]
    total = lambda name: float(sum(step[name] for step in steps))  # noqa: E731
    tenth = max(len(steps) // 10, 1)
    parts = [steps[at : at + tenth] for at in range(0, len(steps), tenth)]
    return {
        "rollouts": int(total("rollouts")),
        "tokens": round(sum(step["rollouts"] * step["length"] for step in steps)),
        "rollout_seconds": total("rollout_seconds"),
        "update_seconds": total("update_seconds"),
        "held_out": [[x["step"], x["eval/success"]] for x in lines if "eval/success" in x],
        "outcomes": {
            name: [x[f"eval/info/{name}"] for x in lines if f"eval/info/{name}" in x]
            for name in OUTCOMES
            if f"eval/info/{name}" in lines[-1] | lines[0]
        },
        "tenths": {
            name: [mean_or_none([step[name] for step in part if name in step]) for part in parts]
            for name in KEPT
            if any(name in step for step in steps)
        },
    }


def report(results: list[Result]) -> str:
    """Format a table of cost and held-out success in percent, mean over seeds ± standard error."""
    rows = []
    for (task, arm), of_arm in by_key(results, "task", "arm").items():
        gained = [100 * (r["after"] - r["before"]) for r in of_arm]
        cost = max(r["cpu_seconds"] + r["baseline_cpu_seconds"] for r in of_arm) / 60
        rows.append(
            (
                task,
                arm,
                seeds_text(of_arm),
                mean_text([100 * r["before"] for r in of_arm], 1),
                mean_text([100 * r["after"] for r in of_arm], 1),
                mean_text(gained, 1, "+"),
                f"{min(gained):+.1f}",
                f"{np.mean([r['updates'] for r in of_arm]):,.0f}",
                f"{np.mean([r.get('rollouts', 0) for r in of_arm]):,.0f}",
                f"{np.mean([r.get('tokens', 0) for r in of_arm]):,.0f}",
                f"{cost:.1f}",
                mean_text([100 * late_mixed(r) for r in of_arm if "tenths" in r], 1),
            )
        )
    head = (
        "task, arm, seeds, before, after, gained, least, updates, rollouts, tokens, CPU-min, "
        "rollouts in mixed groups (last half)"
    )
    lines = markdown_table(head.split(", "), rows)
    if told := [result for result in results if result.get("outcomes")]:
        lines += ["", *outcomes_table(told)]
    return "\n".join(lines)


def late_mixed(result: Result) -> float:
    """Compute the fraction of rollouts in groups with mixed outcomes, in the last half of a run."""
    parts = result["tenths"]
    tenths = parts["mixed_rollouts" if "mixed_rollouts" in parts else "mixed_groups"]
    return float(np.mean(tenths[len(tenths) // 2 :]))


def outcomes_table(results: Sequence[Result]) -> list[str]:
    """Format a table of held-out `OUTCOMES` in percent, before and after training."""
    rows = []
    for (task, arm), of_arm in by_key(results, "task", "arm").items():
        for when, index in (("before", 0), ("after", -1)):
            shares = [
                mean_text([100 * result["outcomes"][name][index] for result in of_arm], 1)
                for name in OUTCOMES
            ]
            rows.append((task, arm, when, *shares))
    return markdown_table(("task", "arm", "", *OUTCOMES), rows)


def command() -> None:
    run_command(main, Experiment)


if __name__ == "__main__":
    command()
