"""Find the problems that a model never solves: python -m train.rl.probe --weights runs/sft

The knowledge-enhanced reward of TruthRL reads the file that this command writes:
`--method "truthrl(knowledge=True, probe='probe.jsonl')"`.
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from train.cli.command import run_command
from train.models.fingerprint import fingerprint
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.learning.penalties import Ternary
from train.rl.learning.policy import sampler_of
from train.rl.rollout.sampler import Sampler
from train.rl.tasks.probed import WITHOUT_MODEL, Probed, is_probe, read_probe
from train.rl.types import Problem, Trajectory
from train.runs.appended import append_objects, drop_half_line


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Samples answers to a task's training problems and counts the right answers.

    A problem is out of the model's knowledge if none of its sampled answers is right. An
    interrupted probe resumes if it is run again with the same options and the same model.

    Attributes:
        weights: Model that answers: a run folder, "smollm2", a Hugging Face folder, or a .gguf
            file.
        task: Task with its options.
        pool: Number of training problems, beginning with the first; None for all problems of a
            finite task.
        samples: Number of answers to each problem.
        temperature: Sampling temperature of the answers.
        top_p: Cumulative probability of nucleus sampling (top-p).
        max_new_tokens: Maximum number of tokens of an answer.
        chat: Whether prompts are rendered as messages in the model's chat template.
        boxed: Whether an answer counts only inside of `\\boxed{...}`.
        unknown: Phrase that counts as abstaining; empty for the task's phrase, or "I don't know"
            where the task has none.
        batch_size: Number of problems whose answers are sampled before their counts are written.
        max_rows: Maximum number of answers that are generated at a time.
        seed: Seed of the task and of the answers.
        out: JSON Lines file of the counts, with one line for each problem.
    """

    weights: str = "smollm2"
    task: str = "arithmetic"
    pool: int | None = None
    samples: int = 256
    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 64
    chat: bool = False
    boxed: bool = False
    unknown: str = ""
    batch_size: int = 16
    max_rows: int = 256
    seed: int = 0
    out: str = "probe.jsonl"

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "batch_size", "max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more")
        if self.pool is not None and self.pool < 1:
            raise ValueError(
                f"pool={self.pool}: choose 1 or more, or leave it out for all problems"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: choose more than 0 and at most 1")
        object.__setattr__(self, "out", os.path.expanduser(self.out))

    @property
    def reward(self) -> Any:
        """Reward shaping that scores answers by outcome, for `RLConfig.reward`."""
        return Ternary(boxed=self.boxed, unknown=self.unknown)

    @property
    def rl(self) -> RLConfig:
        """Config of a run of reinforcement learning that samples answers with these options."""
        return RLConfig(
            weights=self.weights,
            train="all",
            task=self.task,
            reward=self.reward,
            advantage="dr_grpo",
            pool=self.pool,
            num_generations=max(self.samples, 2),
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            chat=self.chat,
            batch_size=self.batch_size,
            max_rows=self.max_rows,
            seed=self.seed,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Options that the counts depend on, stored in the file beside the model's fingerprint."""
        free = ("pool", "batch_size", "max_rows", "out")
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in free}


def main(config: ProbeConfig) -> None:
    """Probe the problems that are not in the file, and print how many have no right answer."""
    probe(config, RLJob(config.rl))
    _, problems = read_probe(config.out)
    never = sum(not problem.correct for problem in problems)
    print(f"{config.out}: {never} of {len(problems)} problems have no right answer in ", end="")
    print(f"{config.samples}")


def probe(config: ProbeConfig, job: RLJob) -> None:
    """Probe the problems that are not in the file yet, and append their counts to the file.

    Args:
        config: Options of the probe.
        job: Job of `config.rl`.

    Raises:
        ValueError: The task is endless and no pool is given, a scorer raised, or the file was not
            written by a probe of this model with these options.
    """
    out, options = Path(config.out), config.options | {"model": fingerprint(job.lm, configs=False)}
    drop_half_line(out, is_probe)
    if out.exists() and out.stat().st_size:
        known, found = read_probe(out)
        if "model" not in known:
            raise ValueError(f"{out} {WITHOUT_MODEL}: choose another file")
        if changed := [n for n in {**known, **options} if known.get(n) != options.get(n)]:
            name = min(changed, key=lambda name: (name == "model", name))
            where = f" at {config.weights}" if name == "model" else ""
            raise ValueError(
                f"{out} was probed with {name}={known.get(name)!r}, now it is "
                f"{options.get(name)!r}{where}: choose another file"
            )
        done = {problem.uid for problem in found}
    else:
        done = set()
        append_objects(out, [{"probe": options}], is_probe)
    missing = list(training_problems(job.task, config.pool, done))
    sampler = nucleus_sampler(config, job)
    for start in range(0, len(missing), config.batch_size):
        problems = missing[start : start + config.batch_size]
        counts = map(dataclasses.asdict, sample(config, job, sampler, problems))
        append_objects(out, counts, is_probe)


def sample(
    config: ProbeConfig, job: RLJob, sampler: Sampler, problems: list[Problem]
) -> list[Probed]:
    """Sample answers to problems, and count the right ones.

    Args:
        config: Options of the probe.
        job: Job of `config.rl`.
        sampler: Sampler of the policy.
        problems: Problems to answer.

    Returns:
        Counts of each problem, in the order of the problems.

    Raises:
        ValueError: A scorer raised.
    """
    counts = [config.samples] * len(problems)
    rows = job.collector.strategy.collect(sampler, job.task, problems, counts, (config.seed,))
    check_scorer(job.task, rows)
    right = [0.0] * len(problems)
    for row in rows:
        right[row.group] += row.reward.info["accuracy"]
    return [
        Probed(problem.uid, round(count), config.samples)
        for problem, count in zip(problems, right, strict=True)
    ]


def check_scorer(task: Any, rows: Sequence[Trajectory]) -> None:
    """Raise a `ValueError` if a scorer raised, since the outcome of that response is unknown.

    Args:
        task: Task or environment, whose name is in the message.
        rows: Trajectories with their rewards.
    """
    for row in rows:
        if row.reward.info.get("scorer_errors"):
            why = row.reward.error.strip().rpartition("\n")[2] or "its scorer says not why"
            raise ValueError(f"the scorer of {task.name} raised ({why}): mend it")


def nucleus_sampler(config: ProbeConfig, job: RLJob) -> Sampler:
    """Return a sampler of the job's first variables with the `top_p` of the config.

    Args:
        config: Options of the probe.
        job: Job of `config.rl`, from which the temperature and all other options are taken.
    """
    variables = jax.device_put(job.first_variables(), job.trainable.shardings.variables)
    sampling = dataclasses.replace(job.sampling(), top_p=config.top_p)
    policy = sampler_of(job.trainable.model(variables))
    return Sampler(policy, sampling, config.max_rows, job.trainable.mesh)


def training_problems(task: Any, pool: int | None, done: Collection[str] = ()) -> Iterator[Problem]:
    """Yield training problems without duplicates.

    Args:
        task: Task or environment.
        pool: Number of training problems to go through, beginning with the first; None for all.
        done: Names (`Problem.uid`) of problems to leave out.

    Raises:
        ValueError: The task is endless and no pool is given.
    """
    size = task.sizes["train"]
    if size is None and pool is None:
        raise ValueError(f"pool=None: {task.name} is endless, choose a number of problems")
    seen = set(done)
    for index in range(min(size or pool or 0, pool or size or 0)):
        problem = task.problem("train", index)
        if problem.uid not in seen:
            seen.add(problem.uid)
            yield problem


def command() -> None:
    run_command(main, ProbeConfig)


if __name__ == "__main__":
    command()
