"""Train a trigger of latent memory for a forking decoder, with and without search and knapsack.

python -m train.experiments.synthesis --out synthesis.jsonl
python -m train.experiments.synthesis --report synthesis.jsonl

A small forking decoder is trained on episodes that a random player plays in an environment of
several turns. A weaver for this decoder is trained on episodes of the scripted player. Then decoder
and weaver are frozen, and a trigger is trained by reinforcement learning to decide when memory is
invoked. In the arm "synthesis", tree search (DeepSearch) generates the trigger's rollouts, and a
knapsack allocates backups to the trees. The other arms leave out the search, the knapsack, or both,
and train until they have generated at least as many tokens as the synthesis. Each finished run
(arm, seed and steps) is one line of the file; a second call trains only the missing runs.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from memgen import LoRAConfig, MemGenConfig, TriggerConfig, WeaverConfig
from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data import ByteTokenizer
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import TrainState
from train.experiments.environments import player_episode
from train.experiments.reinforce import supervise
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
from train.rl.named_tasks import make_task
from train.rl.rollout.episodes import Rollout
from train.rl.rollout.rows import make_rows
from train.rl.step_metrics import held_out_metrics

MODEL = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size, embed_dim=48, num_layers=2, num_heads=4, mlp_dim=192,
    fork_layers=(1,), merge="residual", policy=PrefixRank(2.0),
)  # fmt: skip
MEMGEN = MemGenConfig(WeaverConfig(4, 0, lora=LoRAConfig(4, 8.0)), max_inference_events=0)
TRIGGER = TriggerConfig("reasoner_hidden")
MAX_NEW_TOKENS = 4
MAX_OBSERVATION = 10
DEMONSTRATIONS = 512  # number of a player's episodes for supervised training
ROWS = 64  # number of rows of a supervised step
MOST_STEPS = 10_000  # steps in an arm's config; `score_arm` decides when training ends

SEARCH = "deepsearch(width=4, max_observation=10, threshold=0.5)"
PLAIN = {
    "method": "deepsearch",
    "strategy": f"turns(max_observation={MAX_OBSERVATION}, keep_context=True)",
}
KNAPSACK = {"allocator": "knapsack(high=32)"}
SYNTHESIS = "synthesis"
ARMS: dict[str, dict[str, Any]] = {
    SYNTHESIS: {"method": SEARCH, **KNAPSACK},
    "without knapsack": {"method": SEARCH},
    "without search": PLAIN | KNAPSACK,
    "plain sampling": PLAIN,
}
"""Mapping from an arm to the fields of `RLConfig` that it changes.

All arms use the method `deepsearch`, whose advantages without a tree are those of Dr. GRPO.
"""
SHARED = ("environment", "learning_rate", "batch_size", "num_generations", "supervised", "episodes")
"""Options that must be equal for all results of a file."""


@dataclasses.dataclass(frozen=True)
class Experiment(StudyConfig):
    """Trains a trigger with each arm, or reports stored results.

    Attributes:
        arms: Arms to train: "synthesis", "without knapsack", "without search", "plain sampling".
            The arm "synthesis" of a seed runs first, since it sets the number of tokens of the
            other arms.
        environment: Environment with its options, which must have a random and a scripted player
            and a finite number of training problems, as "guess_number" has.
        supervised: Number of supervised training steps of the decoder, and also of the weaver.
        steps: Number of training steps of the arm "synthesis".
        batch_size: Number of problems in a step.
        num_generations: Mean number of rollouts of a problem, or of backups in its search tree.
        learning_rate: Constant learning rate of the trigger.
        episodes: Number of sampled episodes on training problems that score a policy, before and
            after training.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    environment: str = "guess_number(high=12, max_turns=3)"
    supervised: int = 400
    steps: int = 60
    batch_size: int = 8
    num_generations: int = 8
    learning_rate: float = 3e-2
    episodes: int = 512
    out: str = "synthesis.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("arm", self.arms, ARMS)


def main(config: Experiment) -> None:
    """Train the triggers that the file of results lacks, or print the table."""
    run_study(config, ("arm", "seed", "steps"), train_missing, report)


def train_missing(config: Experiment, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    All arms of a seed use the same decoder and weaver.

    Raises:
        ValueError: The file has results with other options, the environment has endless training
            problems, or an arm needs the synthesis of its seed, which is neither in the file nor
            among `config.arms`.
    """
    check_options(config, results.found)
    if make_task(config.environment, 0).sizes["train"] is None:
        raise ValueError(
            f"environment={config.environment} has endless training problems, which can't all be "
            "played: choose one with a number of them, such as guess_number"
        )
    for seed in config.seeds:
        runs = [{"arm": arm, "seed": seed, "steps": config.steps} for arm in config.arms]
        runs = sorted(results.missing(runs), key=lambda run: run["arm"] != SYNTHESIS)
        if not runs:
            continue
        lm = taught(config, seed)
        before = played(plain_job(config, lm, seed), config.episodes)
        print(f"seed {seed}: success {before['success']:.1%} before", flush=True)
        for run in runs:
            tokens = _tokens_of_synthesis(results, run)
            result = run | {"before": before} | score_arm(config, lm, run["arm"], seed, tokens)
            yield (
                result,
                (
                    f"{run['arm']} seed {seed}: success {before['success']:.1%} -> "
                    f"{result['after']['success']:.1%}, {result['tokens']:,} tokens, "
                    f"{result['cpu_seconds']:.0f} s"
                ),
            )


def check_options(config: Experiment, found: Sequence[Result]) -> None:
    """Check that the results of the file have the same values of the options `SHARED` as this call.

    A result that lacks an entry counts as a result with the option's default.

    Args:
        config: Options of this call.
        found: Results of the file.

    Raises:
        ValueError: A result has another value of an option.
    """
    for result, name in itertools.product(found, SHARED):
        was, now = result.get(name, getattr(Experiment, name)), getattr(config, name)
        if was != now:
            raise ValueError(
                f"{config.out} has results of {name}={was!r}, now it is {now!r}: choose another "
                "file"
            )


def _tokens_of_synthesis(results: Results, run: Result) -> int | None:
    """Return the number of tokens that the synthesis of a run's seed and steps has generated.

    Returns:
        Number of tokens; None if the run is itself a synthesis, which ends after its steps instead.

    Raises:
        ValueError: The synthesis of this seed has not been run.
    """
    if run["arm"] == SYNTHESIS:
        return None
    for found in results.found:
        same = all(found[name] == run[name] for name in ("seed", "steps"))
        if same and found["arm"] == SYNTHESIS:
            return found["tokens"]
    raise ValueError(
        f"arms={run['arm']!r} of seed {run['seed']} gets as many tokens as the {SYNTHESIS}, which "
        "is not in the file: name that arm too"
    )


def run_config(config: Experiment, seed: int, **changes: Any) -> RLConfig:
    """Return the config of reinforcement learning of a trigger, with some fields changed.

    Args:
        config: Options of the experiment.
        seed: Seed of the run.
        changes: Fields of `RLConfig` with their new values.
    """
    base = RLConfig(
        weights="players",
        train="trigger",
        task=config.environment,
        steps=MOST_STEPS,
        batch_size=config.batch_size,
        num_generations=config.num_generations,
        max_new_tokens=MAX_NEW_TOKENS,
        max_rows=config.batch_size * config.num_generations,
        trigger=TRIGGER,
        environment_limit_s=None,
        seed=seed,
        optimizer=OptimizerConfig(
            learning_rate=config.learning_rate, weight_decay=0.0, warmup=0.0, final_ratio=1.0
        ),
        evaluation=EvalConfig(every=0, rows=8),
    )
    return dataclasses.replace(base, **changes)


def make_job(config: Experiment, lm: LanguageModel, seed: int, **changes: Any) -> RLJob:
    return RLJob(run_config(config, seed, **changes), lm, devices=jax.devices()[:1])


def plain_job(config: Experiment, lm: LanguageModel, seed: int) -> RLJob:
    return make_job(config, lm, seed, **ARMS["plain sampling"])


def taught(config: Experiment, seed: int) -> LanguageModel:
    """Train a decoder on the random player's episodes, and a weaver on the scripted player's.

    Args:
        config: Options of the experiment.
        seed: Seed of parameters, episodes and batches.

    Returns:
        The forking decoder, which plays at random, with a weaver whose latents make it play like
        the scripted player (by bisection in "guess_number").
    """
    model = Thoughtbubbles(MODEL, rngs=nnx.Rngs(seed))
    lm = LanguageModel(model, ByteTokenizer())
    options: Any = {"steps": config.supervised, **PLAIN}
    optimizer = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1)
    job = make_job(config, lm, seed, train="all", optimizer=optimizer, **options)
    reasoner = job.trainable.model(_behavior_cloned(config, job, "random").variables).backbone.model
    lm = LanguageModel(reasoner, lm.tokenizer)
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    job = make_job(config, lm, seed, train="weaver", memgen=MEMGEN, optimizer=optimizer, **options)
    woven = job.trainable.model(_behavior_cloned(config, job, "scripted").variables).memgen
    return LanguageModel(reasoner, lm.tokenizer, woven)


def _behavior_cloned(config: Experiment, job: RLJob, player: str) -> TrainState:
    """Run supervised training of a job's model on a player's episodes, and return the final state.

    If the job trains a weaver, each turn of an episode invokes memory with probability 1/2.
    """
    task, seed = make_task(config.environment, job.config.seed), job.config.seed
    problems = job.collector.problems("train", 0, DEMONSTRATIONS)
    rows = [
        player_episode(job.lm, task, Rollout(0, problem, number), seed, player, invokes=True)
        for number, problem in enumerate(problems)
    ]
    arrays = make_rows(rows, [np.zeros(len(row.tokens)) for row in rows], events=job.events_per_row)
    names = ("tokens", "trained", "length", "decisions", "point", "kind")
    given = {name: arrays[name] for name in names if name in arrays}
    return next(itertools.islice(supervise(job, given, ROWS), config.supervised - 1, None))


def score_arm(
    config: Experiment, lm: LanguageModel, arm: str, seed: int, tokens: int | None
) -> dict[str, Any]:
    """Train a trigger with one arm, and score it.

    Args:
        config: Options of the experiment.
        lm: Decoder and weaver.
        arm: Name of the arm, a key of `ARMS`.
        seed: Seed of the trigger and of rollouts.
        tokens: Number of generated tokens after which training ends, at the end of a step; None
            trains `config.steps` steps.

    Returns:
        Entries of a result: `after` (means of `played` with the trained trigger); the numbers of
        generated `tokens`, of `rollouts` and of optimizer `updates`; `mixed_rollouts` and
        `mixed_groups` (fractions of rollouts and of problems whose group has mixed outcomes, in the
        last half of the steps); `most` (maximum number of rollouts of a problem in a step; 0
        without a knapsack); the numbers of `trees`, of `solved_trees` among them, and of problems
        that are `set_aside` at the end (all 0 without search); the time of training with
        compilation, in `seconds` and `cpu_seconds`; the options `SHARED`; the numbers of the
        decoder's `parameters` and of `trained` parameters; the arm's `options`; the version of
        `jax`.
    """
    clock = Clock()
    job = make_job(config, lm, seed, **ARMS[arm])
    state, lines, spent, rollouts = job.first_state(), [], 0, 0
    while spent < tokens if tokens is not None else len(lines) < config.steps:
        state, metrics, collected = job.step(state)
        lines.append(metrics)
        spent += collected.generated
        rollouts += int(metrics["rollouts"])
    cost = clock.read()
    late = lines[len(lines) // 2 :]
    final = plain_job(config, lm, seed)
    return {
        "after": played(final, config.episodes, state.variables),
        "tokens": spent,
        "rollouts": rollouts,
        "updates": int(state.step),
        "mixed_rollouts": float(np.mean([line["mixed_rollouts"] for line in late])),
        "mixed_groups": float(np.mean([line["mixed_groups"] for line in late])),
        "most": max((line.get("budget/most", 0) for line in lines), default=0),
        "solved_trees": sum(line.get("search/solved", 0) for line in lines),
        "trees": sum(line.get("search/trees", 0) for line in lines),
        "set_aside": lines[-1].get("search/aside", 0),
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        **{name: getattr(config, name) for name in SHARED},
        "parameters": job.trainable.config.num_params(),
        "trained": job.trainable.num_trained,
        "options": ARMS[arm],
        "jax": jax.__version__,
    }


def played(job: RLJob, episodes: int, variables: Any = None) -> dict[str, float]:
    """Sample episodes of all training problems, spread over the problems as evenly as possible.

    Args:
        job: Job whose strategy and environment are used. The environment has a finite number of
            training problems.
        episodes: Number of episodes over all problems.
        variables: State of the policy's parameters (`TrainState.variables`); None for the job's
            initial parameters.

    Returns:
        Means over episodes: `success` (from 0 to 1) and `info/turns`; and `invocation_rate`, the
        fraction of decisions that invoke memory.
    """
    size: Any = job.task.sizes["train"]
    problems = [job.task.problem("train", at) for at in range(size)]
    counts = [len(range(at, episodes, len(problems))) for at in range(len(problems))]
    sampler = job.sampler(job.first_state().variables if variables is None else variables)
    rows = job.collector.strategy.collect(sampler, job.task, problems, counts, (7, 7))
    found = held_out_metrics(rows)
    return {name: found[name] for name in ("success", "info/turns", "invocation_rate")}


def report(results: list[Result]) -> str:
    """Format a Markdown table with a row for each arm: means over seeds ± standard errors.

    Results that differ in `steps` have separate rows, which name the number.
    """
    return "\n".join(markdown_table(HEAD, _cells(results)))


HEAD = (
    "arm", "seeds", "success before, %", "after, %", "memory invoked, %", "tokens", "rollouts",
    "optimizer steps", "rollouts in mixed groups (last half), %", "CPU-seconds",
)  # fmt: skip


def _cells(results: list[Result]) -> Iterator[Sequence[str]]:
    differ = differing(results, ("steps",))
    for (arm, *_), found in by_key(results, "arm", *differ).items():
        percent = lambda entry, name, found=found: [100 * r[entry][name] for r in found]  # noqa: E731
        count = lambda name, found=found: f"{np.mean([r[name] for r in found]):,.0f}"  # noqa: E731
        yield (
            f"{arm}{settings_text(found[0], differ)}",
            seeds_text(found),
            mean_text(percent("before", "success"), 1),
            mean_text(percent("after", "success"), 1),
            mean_text(percent("after", "invocation_rate"), 1),
            *(count(name) for name in ("tokens", "rollouts", "updates")),
            mean_text([100 * result["mixed_rollouts"] for result in found], 1),
            count("cpu_seconds"),
        )


def command() -> None:
    run_command(main, Experiment)


if __name__ == "__main__":
    command()
