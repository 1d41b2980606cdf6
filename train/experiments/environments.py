"""Scores of the random, the scripted and trained players of environments, as a table.

python -m train.experiments.environments --episodes 500
python -m train.experiments.environments --environments guess_number --arms "ppo(gamma=0.9)" grpo

A trained player is a small decoder of bytes that has seen episodes of the random player, so that it
knows how actions are written, and then learns by a method of `train.rl`. All arms of an environment
begin with the same weights and get as many rollouts. It is scored as it was trained, by samples.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles
from train.cli.command import run_command
from train.data import ByteTokenizer
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.experiments.reinforce import supervise
from train.experiments.study import check_finished, check_names, check_options
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

PLAYERS = ("random", "scripted")
MODEL = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256
)
SHOWN = 256  # episodes of the random player that a trained one has seen
ROWS = 64  # of a supervised step
MAX_NEW_TOKENS = 8
MAX_OBSERVATION = 64


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Plays the first training problems of each environment by its two players, and trains more.

    Attributes:
        environments: Environments with their options; all that have players by default.
        episodes: Number of episodes of each player.
        seed: Seed of the order of problems, of the players and of trained weights.
        arms: Methods of `train.rl` with their options, each of which trains a player of each
            environment; none by default.
        supervised: Number of optimizer steps on episodes of the random player.
        steps: Number of steps of each method.
        batch_size: Number of problems of a step.
        num_generations: Number of episodes of each problem.
        learning_rate: Peak learning rate of each method.
    """

    environments: tuple[str, ...] = tuple(
        name for name, kind in ENVIRONMENTS.items() if hasattr(kind, "random_action")
    )
    episodes: int = 500
    seed: int = 0
    arms: tuple[str, ...] = ()
    supervised: int = 100
    steps: int = 200
    batch_size: int = 8
    num_generations: int = 8
    learning_rate: float = 1e-3

    def __post_init__(self):
        check_options(self)
        for arm in self.arms:
            part_from_text("method", arm)


def main(config: Experiment) -> None:
    """Print a row for each environment and player."""
    names = [text.partition("(")[0] for text in config.environments]
    check_names("environment with players", names, Experiment.environments)
    print("| environment | player | success | reward | turns |\n|---|---|---|---|---|")
    for text in config.environments:
        environment = make_task(text, config.seed)
        for player in PLAYERS:
            score = score_player(environment, player, config.episodes, config.seed, "train")
            print(table_row(text, player, score), flush=True)
        if config.arms:
            start = shown_episodes(config, text, environment)
            print(table_row(text, "before", sampled_score(start, config.episodes)), flush=True)
            for arm in config.arms:
                job = trained(config, text, environment, start.lm, arm)
                score = sampled_score(job, config.episodes)
                print(table_row(text, f"`{arm}`", score), flush=True)


def table_row(environment: str, player: str, score: Score) -> str:
    """A row of the markdown table."""
    return (
        f"| `{environment}` | {player} | {score.success:.3f} ± {score.success_error:.3f} "
        f"| {score.reward:.3f} | {score.turns:.2f} |"
    )


def run_config(config: Experiment, environment: str, **changes: Any) -> RLConfig:
    """Config of a run of reinforcement learning in an environment, with `changes` of its fields."""
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
        seed=config.seed,
        optimizer=OptimizerConfig(
            learning_rate=config.learning_rate, weight_decay=0.0, final_ratio=0.1
        ),
        evaluation=EvalConfig(every=0, rows=8),
        save_every=config.steps,
        log_every=10,
        examples=0,
    )
    return dataclasses.replace(base, **changes)


def shown_episodes(config: Experiment, text: str, environment: Any) -> RLJob:
    """A decoder that has been trained on the actions of the random player, as a job."""
    lm = LanguageModel(Thoughtbubbles(MODEL, rngs=nnx.Rngs(config.seed)), ByteTokenizer())
    optimizer = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1)
    run = run_config(config, text, steps=config.supervised, optimizer=optimizer)
    job = RLJob(run, lm, environment)
    problems = job.collector.problems("train", 0, SHOWN)
    rows = [
        player_episode(lm, environment, Rollout(0, problem, number), config.seed)
        for number, problem in enumerate(problems)
    ]
    arrays = make_rows(rows, [np.zeros(len(row.tokens)) for row in rows])
    states = supervise(job, {name: arrays[name] for name in ("tokens", "trained", "length")}, ROWS)
    state = next(itertools.islice(states, config.supervised - 1, None))
    model = job.trainable.model(state.weights).backbone.model
    return RLJob(run_config(config, text), LanguageModel(model, lm.tokenizer), environment)


def player_episode(
    lm: LanguageModel,
    environment: Any,
    rollout: Rollout,
    seed: int,
    player: str = "random",
    invokes: bool = False,
) -> Trajectory:
    """An episode of a player as one row, whose actions end in a stop id.

    Args:
        lm: Language model whose tokens are written.
        environment: Environment with players.
        rollout: Rollout that the row is of.
        seed: Seed of the player.
        player: "random" or "scripted".
        invokes: Whether a coin decides for each turn if latent memory is invoked before it.
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


def trained(config: Experiment, text: str, environment: Any, lm: LanguageModel, arm: str) -> RLJob:
    """The policy that a method makes of a decoder, as a job."""
    with tempfile.TemporaryDirectory() as folder:
        train(RLJob(run_config(config, text, method=arm, out=folder), lm, environment))
        check_finished(folder, config.steps)
        return RLJob(run_config(config, text), load_model(folder), environment)


def sampled_score(job: RLJob, episodes: int) -> Score:
    """Scores of a policy on as many episodes of the first training problems as other players play.

    Args:
        job: Job whose initial weights are the policy.
        episodes: Number of episodes; a finite split begins again at its end.
    """
    size = job.task.sizes["train"]
    count = episodes if size is None else min(size, episodes)
    problems = [job.task.problem("train", index) for index in range(count)]
    counts = [len(range(index, episodes, count)) for index in range(count)]
    sampler = job.sampler(job.first_state().weights)
    strategy = job.collector.strategy
    return score_of(strategy.collect(sampler, job.task, problems, counts, (job.config.seed, 2)))


def score_of(rows: Sequence[Trajectory]) -> Score:
    """Means over the episodes of rows; one that fails has as many turns as it was given."""
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
