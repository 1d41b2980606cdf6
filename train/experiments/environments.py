"""Compare the scores of random, scripted and trained players in environments.

python -m train.experiments.environments --episodes 500
python -m train.experiments.environments --environments guess_number --arms "ppo(gamma=0.9)" grpo
python -m train.experiments.environments --report environments.jsonl

A trained player is a small byte-level decoder. It is first trained on episodes of the random
player, so that it learns how actions are written, and then by a method of `train.rl` (an arm). All
arms of an environment and seed start from the same parameters and use equally many rollouts per
step (methods with dynamic sampling generate more). Trained players are scored with sampled actions,
as in training. Each score is one line of the file; a second call computes only missing scores.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data import ByteTokenizer
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.experiments.reinforce import of_a_run, supervise
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
from train.models.load import LanguageModel, load_model
from train.rl.config import RLConfig
from train.rl.environments import ENVIRONMENTS
from train.rl.environments.players import Score, play_episode, player_of, score_player
from train.rl.job import RLJob
from train.rl.loop import train
from train.rl.named_tasks import make_task
from train.rl.parts import part_from_text
from train.rl.rollout.episodes import Rollout, TrajectoryBuilder
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.rows import make_rows
from train.rl.rollout.sampler import Sampled
from train.rl.types import Completion, Episodes, Reward, Trajectory
from train.runs.metrics import read_metrics

PLAYERS = ("random", "scripted")
MODEL = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256
)
DEMONSTRATIONS = 256  # number of the random player's episodes that supervised training uses
ROWS = 64  # number of rows in a supervised step
MAX_NEW_TOKENS = 8
MAX_OBSERVATION = 64
BEFORE = "before"
SIZES = ("supervised", "steps", "batch_size", "num_generations", "learning_rate")
KEY = ("environment", "player", "seed", "episodes", *SIZES)


@dataclasses.dataclass(frozen=True)
class Experiment(StudyConfig):
    """Scores the random, the scripted and trained players on each environment's training problems.

    Attributes:
        environments: Environments with their options; by default all with a random player.
        episodes: Number of episodes that each player is scored on.
        seeds: Seeds of the order of problems, of the players and of training.
        arms: Methods of `train.rl` with their options; each method trains one player in each
            environment. By default no player is trained.
        supervised: Number of supervised steps on episodes of the random player, before each method.
        steps: Number of training steps of each method.
        batch_size: Number of problems in a training step.
        num_generations: Number of episodes of each problem in a training step.
        learning_rate: Peak learning rate of each method; the method brorl scales this rate.
    """

    environments: tuple[str, ...] = tuple(
        name for name, kind in ENVIRONMENTS.items() if hasattr(kind, "random_action")
    )
    episodes: int = 500
    seeds: tuple[int, ...] = (0,)
    arms: tuple[str, ...] = ()
    supervised: int = 100
    steps: int = 200
    batch_size: int = 8
    num_generations: int = 8
    learning_rate: float = 1e-3
    out: str = "environments.jsonl"

    def __post_init__(self):
        super().__post_init__()
        for arm in self.arms:
            part_from_text("method", arm)


def main(config: Experiment) -> None:
    """Score the players that the file of results lacks, or print the table.

    Raises:
        ValueError: An environment is unknown or has no random player.
    """
    names = [text.partition("(")[0] for text in config.environments]
    check_names("environment with players", names, Experiment.environments)
    run_study(config, KEY, play_missing, report)


def play_missing(config: Experiment, results: Results) -> Iterator[tuple[Result, str]]:
    """Score the players that `results` lacks, and yield each result with a line to print.

    Trained players are trained first. If any arm is missing, the decoder that all arms start from
    is scored too, as the player "before".
    """
    sizes = {name: getattr(config, name) for name in SIZES}
    untrained: Result = dict.fromkeys(SIZES)
    shown = untrained | {"supervised": config.supervised}
    for text, seed in itertools.product(config.environments, config.seeds):
        common = {"environment": text, "seed": seed, "episodes": config.episodes}
        environment = make_task(text, seed)
        for run in results.missing(common | untrained | {"player": name} for name in PLAYERS):
            name = run["player"]
            score = score_player(environment, name, config.episodes, seed, "train")
            yield scored(run, score)
        if not config.arms:
            continue
        before = common | shown | {"player": BEFORE}
        runs = results.missing(common | sizes | {"player": arm} for arm in config.arms)
        if not runs:
            continue
        start = behavior_cloned(config, text, environment, seed)
        if before not in results:
            yield scored(before, sampled_score(start, config.episodes))
        for run in runs:
            job, cost = trained(config, text, environment, start.lm, seed, run["player"])
            yield scored(run | cost, sampled_score(job, config.episodes))


def scored(run: Result, score: Score) -> tuple[Result, str]:
    """Combine a run with the score of its player.

    Args:
        run: Entries `KEY` of the run; for a trained player also the cost of training.
        score: Means over the player's episodes.

    Returns:
        A result with the entries of `run` and the fields of `score`, and a line to print.
    """
    return (
        dataclasses.asdict(score) | run,
        f"{run['environment']}, {run['player']}, seed {run['seed']}: success {score.success:.3f} ± "
        f"{score.success_error:.3f}, reward {score.reward:.3f}, {score.turns:.2f} turns",
    )


def report(results: list[Result]) -> str:
    """Format a Markdown table with a row for each environment, player and combination of options.

    Scores are means over seeds ± standard errors; with a single seed, the error of success is the
    standard error over episodes. Options that differ between results are named next to the player.
    """
    head = (
        "environment, player, seeds, success, reward, turns, rollouts, tokens, updates, CPU-seconds"
    )
    options = ("episodes", *SIZES)
    differ = [name for name in options if len({run[name] for run in results} - {None}) > 1]
    rows = []
    for (environment, player, *_), runs in by_key(
        results, "environment", "player", *options
    ).items():
        shown = [f"{name} {runs[0][name]}" for name in differ if runs[0][name] is not None]
        success = mean_text([run["success"] for run in runs], 3)
        if len(runs) == 1:
            success += f" ± {runs[0]['success_error']:.3f}"
        learned = "tokens" in runs[0]
        costs = ("rollouts", "tokens", "updates", "cpu_seconds") if learned else ()
        rows.append(
            (
                f"`{environment}`",
                ", ".join([f"`{player}`" if learned else player, *shown]),
                seeds_text(runs),
                success,
                mean_text([run["reward"] for run in runs], 3),
                mean_text([run["turns"] for run in runs], 2),
                *(f"{np.mean([run[name] for run in runs]):,.0f}" for name in costs),
                *[""] * (4 - len(costs)),
            )
        )
    return "\n".join(markdown_table(head.split(", "), rows))


def run_config(config: Experiment, environment: str, seed: int, **changes: Any) -> RLConfig:
    """Return the config of reinforcement learning in an environment, with `changes` applied."""
    base = RLConfig(
        weights="random player",
        train="all",
        task=environment,
        strategy=f"turns(max_observation={MAX_OBSERVATION})",
        steps=config.steps,
        batch_size=config.batch_size,
        num_generations=config.num_generations,
        max_new_tokens=MAX_NEW_TOKENS,
        environment_limit_s=None,
        seed=seed,
        optimizer=OptimizerConfig(
            learning_rate=config.learning_rate, weight_decay=0.0, final_ratio=0.1
        ),
        evaluation=EvalConfig(every=0, rows=8),
        save_every=config.steps,
        log_every=1,
        examples=0,
    )
    return dataclasses.replace(base, **changes)


def behavior_cloned(config: Experiment, text: str, environment: Any, seed: int) -> RLJob:
    """Train a new decoder on the random player's actions, by supervised learning.

    Args:
        config: Options of the experiment.
        text: Name of the environment with its options.
        environment: Environment object that `text` describes.
        seed: Seed of parameters, problems and episodes.

    Returns:
        A reinforcement-learning job that starts from the trained decoder.
    """
    lm = LanguageModel(Thoughtbubbles(MODEL, rngs=nnx.Rngs(seed)), ByteTokenizer())
    optimizer = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1)
    run = run_config(config, text, seed, steps=config.supervised, optimizer=optimizer)
    job = RLJob(run, lm, environment)
    problems = job.collector.problems("train", 0, DEMONSTRATIONS)
    rows = [
        player_episode(lm, environment, Rollout(0, problem, number), seed)
        for number, problem in enumerate(problems)
    ]
    arrays = make_rows(rows, [np.zeros(len(row.tokens)) for row in rows])
    states = supervise(job, {name: arrays[name] for name in ("tokens", "trained", "length")}, ROWS)
    state = next(itertools.islice(states, config.supervised - 1, None))
    model = job.trainable.model(state.variables).backbone.model
    return RLJob(run_config(config, text, seed), LanguageModel(model, lm.tokenizer), environment)


def player_episode(
    lm: LanguageModel,
    environment: Any,
    rollout: Rollout,
    seed: int,
    player: str = "random",
    invokes: bool = False,
) -> Trajectory:
    """Let a player play an episode, and encode the episode as one row of tokens.

    Each action in the row ends in a stop id. Observations are truncated to `MAX_OBSERVATION`
    tokens.

    Args:
        lm: Language model whose tokenizer and stop id are used.
        environment: Environment with players.
        rollout: Rollout with the problem to play.
        seed: Seed of the player, combined with the rollout's number.
        player: Name of the player, "random" or "scripted".
        invokes: Whether the row has a random trigger decision (to invoke or to skip latent memory)
            before the first token of each action; otherwise the row has no decisions.

    Raises:
        ValueError: The environment has no method for this player.
    """
    formatter, problem = PromptFormatter(lm), rollout.problem
    rng = np.random.default_rng([seed, rollout.number])
    played = play_episode(environment, problem, player_of(environment, player), rng)
    row = TrajectoryBuilder(rollout, formatter.prompt(played.shown[:1]))
    actions, observations = played.shown[1::2], played.shown[2::2]
    for turn, (action, observation) in enumerate(zip(actions, observations, strict=True)):
        ids = np.array([*lm.tokenizer.encode(action)[0].tolist(), lm.stop_ids[0]], np.int32)
        decisions = np.full(len(ids), -1, np.int8)
        if invokes:
            decisions[0] = rng.integers(2)
        sampled = Sampled(ids, np.zeros(len(ids), np.float32), decisions)
        row.respond(sampled, Completion(problem, action, tuple(ids.tolist()), True))
        if turn + 1 < len(actions):
            row.observe(formatter.observation(observation, MAX_OBSERVATION))
    reward = Reward(float(sum(played.rewards)), played.last.success)
    return row.trajectory(reward, played.rewards)


def trained(
    config: Experiment, text: str, environment: Any, lm: LanguageModel, seed: int, arm: str
) -> tuple[RLJob, Result]:
    """Train a decoder by a reinforcement-learning method of `train.rl`.

    Args:
        config: Options of the experiment.
        text: Name of the environment with its options.
        environment: Environment object that `text` describes.
        lm: Decoder to start from.
        seed: Seed of the run.
        arm: Method with its options.

    Returns:
        A job that starts from the trained decoder; and entries of a result: those of
        `reinforce.of_a_run`, the number of `updates` (training steps that had rollouts to learn
        from), and the time of training in `seconds` and `cpu_seconds`.
    """
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        train(RLJob(run_config(config, text, seed, method=arm, out=folder), lm, environment))
        check_finished(folder, config.steps)
        lines, cost = read_metrics(folder), clock.read()
        job = RLJob(run_config(config, text, seed), load_model(folder), environment)
    updates = sum("grad_norm" in line for line in lines)  # a step may find nothing to learn from
    found = of_a_run(lines) | {"updates": updates, "seconds": cost.seconds}
    return job, found | {"cpu_seconds": cost.cpu_seconds}


def sampled_score(job: RLJob, episodes: int) -> Score:
    """Score a policy on the first training problems, the same problems as for other players.

    Args:
        job: Job that starts from the policy's parameters.
        episodes: Number of episodes, one for each problem; if the training split has fewer
            problems, its problems are repeated.
    """
    size = job.task.sizes["train"]
    count = episodes if size is None else min(size, episodes)
    problems = [job.task.problem("train", index) for index in range(count)]
    counts = [len(range(index, episodes, count)) for index in range(count)]
    sampler = job.sampler(job.first_state().variables)
    strategy = job.collector.strategy
    return score_of(strategy.collect(sampler, job.task, problems, counts, (job.config.seed, 2)))


def score_of(rows: Sequence[Trajectory]) -> Score:
    """Compute the mean scores of episodes, failed episodes included, from the episodes' rows."""
    episodes = Episodes.from_trajectories(rows)
    turns = [len(rows[mine[0]].turn_rewards) for mine in episodes.rows]
    error = episodes.success.std() / np.sqrt(len(turns))
    return Score(
        len(turns),
        float(episodes.success.mean()),
        float(error),
        float(episodes.reward.mean()),
        float(np.mean(turns)),
    )


def command() -> None:
    run_command(main, Experiment)


if __name__ == "__main__":
    command()
