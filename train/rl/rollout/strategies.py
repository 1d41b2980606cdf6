"""Rollout strategies by name: one response to a problem, or an episode of several turns."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np

from thoughtbubbles.registry import Registry
from train.rl.environments.stepping import TimeLimited, TimeLimits
from train.rl.protocols import Environment, Task
from train.rl.rollout.episodes import (
    TrajectoryBuilder,
    act_all,
    begin_episodes,
    rollout_batches,
    sampling_keys,
    unique_prompts,
)
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.sampler import Sampler
from train.rl.scoring import score_all
from train.rl.types import Problem, Trajectory

_Strategy = TypeVar("_Strategy", bound="RolloutStrategy")

LONGEST = 10_000
"""Maximum number of turns, and of tokens of an observation."""

_MAX_TURNS = 8  # of environments without the attribute `max_turns`


@dataclasses.dataclass(frozen=True)
class RolloutStrategy:
    """Base of all rollout strategies, which sample rollouts of problems.

    A subclass is a frozen dataclass with a `word`, options as fields, and `collect`. Register it as
    `STRATEGIES[word]` to make it available to `--strategy`. State that a strategy keeps between
    steps belongs in a field that is not an option,
    `field(default_factory=dict, init=False, repr=False, compare=False)`, and must be part of
    `state` and `restore`. Each run has its own copy.

    Attributes:
        formatter: Formatter that translates texts to token ids; set by the run.
        max_new_tokens: Maximum number of tokens per response; set by the run.
        environment_limit_s: Number of seconds after which a reset or a step of an environment is
            abandoned (`TimeLimited`), None for no limit; set by the run.
    """

    word: ClassVar[str]
    """Name of the strategy on the command line and in configs."""

    episodic: ClassVar[bool | None] = False
    """Whether the strategy is for environments rather than tasks of one response; None for both."""

    on_policy: ClassVar[bool] = True
    """Whether all rollouts that are trained on are unselected samples of the current policy."""

    _: dataclasses.KW_ONLY
    formatter: PromptFormatter = dataclasses.field(default=cast(Any, None), repr=False)
    max_new_tokens: int = dataclasses.field(default=64, repr=False)
    environment_limit_s: float | None = dataclasses.field(default=30.0, repr=False)

    def limited(self, environment: Environment) -> TimeLimited:
        """Return the environment's `TimeLimited` wrapper, the same wrapper in the whole run."""
        return self._limits.of(environment)

    def share_limits(self, other: _Strategy) -> _Strategy:
        """Return another strategy of the same run, which then counts timeouts with this one."""
        vars(other)["_limits"] = self._limits
        return other

    @functools.cached_property
    def _limits(self) -> TimeLimits:
        return TimeLimits(self.environment_limit_s)

    def for_run(self, formatter: PromptFormatter, config: Any) -> Self:
        """Return a copy of the strategy with the settings of a run.

        Args:
            formatter: Formatter that translates texts to token ids.
            config: Config of the run (`RLConfig`).

        Raises:
            ValueError: An option of the strategy contradicts the config.
        """
        return dataclasses.replace(
            self,
            formatter=formatter,
            max_new_tokens=config.max_new_tokens,
            environment_limit_s=config.environment_limit_s,
        )

    def for_task(self, task: Any) -> Self:
        """Return a copy of the strategy for a task or an environment; called after `for_run`.

        Args:
            task: `Task` or `Environment` of the run.

        Raises:
            ValueError: An option of the strategy does not fit the task.
        """
        del task
        return self

    @property
    def responses_per_row(self) -> int:
        """Maximum number of responses in one row."""
        return 1

    def collect(
        self,
        sampler: Sampler,
        task: Any,
        problems: Sequence[Problem],
        counts: Sequence[int],
        seed: Sequence[int],
    ) -> list[Trajectory]:
        """Make `counts[i]` rollouts of `problems[i]`, for each group `i` of a step.

        Args:
            sampler: Sampler with the current parameters of the policy.
            task: `Task` or `Environment` of the run.
            problems: Problem of each group.
            counts: Number of rollouts of each problem.
            seed: Numbers that all randomness is derived from.

        Returns:
            The rollouts as trajectories, whose `group` is the index of the problem.
        """
        raise NotImplementedError(f"{type(self).__name__} collects no rollouts")

    @property
    def for_held_out(self) -> "RolloutStrategy":
        """Strategy for held-out problems: by default a copy of this one, without its state."""
        return self.share_limits(dataclasses.replace(self))

    def sets_aside(self, uid: str) -> bool:
        """Return whether the problem with this uid is to be skipped for now."""
        del uid
        return False

    def requeue(self) -> None:
        """Take back all problems that were set aside; called when no other problem is left."""

    def metrics(self) -> dict[str, float]:
        """Return metrics of the rollouts since the last call, a dict from name to number."""
        return {}

    @property
    def state(self) -> Any:
        """JSON-serialisable state that is kept between steps; None if the strategy has no state."""
        return None

    def restore(self, state: Any) -> None:
        """Restore the `state` that a checkpoint has stored."""


@dataclasses.dataclass(frozen=True)
class OneResponse(RolloutStrategy):
    """Strategy of one response per rollout; a prompt is prefilled once for a batch of rollouts."""

    word: ClassVar[str] = "one_response"

    def collect(
        self,
        sampler: Sampler,
        task: Task,
        problems: Sequence[Problem],
        counts: Sequence[int],
        seed: Sequence[int],
    ) -> list[Trajectory]:
        prompts = [self.formatter.prompt([problem.prompt]) for problem in problems]
        found = []
        for rollouts in rollout_batches(problems, counts, sampler.max_rows):
            texts, source = unique_prompts([prompts[rollout.group] for rollout in rollouts])
            keys = sampling_keys(rollouts, seed)
            conversation = sampler.open(texts, source, keys, self.max_new_tokens)
            responses = conversation.respond(self.max_new_tokens)
            completions = [
                self.formatter.completion(rollout.problem, sampled)
                for rollout, sampled in zip(rollouts, responses, strict=True)
            ]
            rewards = score_all(task, completions)
            for rollout, sampled, completion, reward in zip(
                rollouts, responses, completions, rewards, strict=True
            ):
                episode = TrajectoryBuilder(rollout, prompts[rollout.group])
                episode.respond(sampled, completion)
                found.append(episode.trajectory(reward, (reward.value,)))
        return found


@dataclasses.dataclass(frozen=True)
class Turns(RolloutStrategy):
    """Strategy of episodes of several turns in an environment.

    Attributes:
        max_turns: Number of turns after which an episode is truncated. None takes the environment's
            `max_turns`, or 8 if it has none.
        max_observation: Maximum number of tokens of an observation; longer ones are truncated.
        keep_context: Whether an episode is one row, whose KV cache and latents are kept from turn
            to turn. Otherwise each turn is a separate row that begins with a prefill of the text so
            far, without earlier latents (as in the authors' MemGen). None keeps the context if the
            run trains the model without latent memory, uses no chat template and has `history`.
        history: Whether the prompt of a turn has all earlier texts. Otherwise the prompt is only
            the last observation, and each turn is a separate row: for environments whose
            observations are whole prompts, such as `sokoban_variants(restate=True)`.

    Raises:
        ValueError: `keep_context` is combined with `history=False` or a chat template, or a number
            is not from 1 to `LONGEST`.
    """

    word: ClassVar[str] = "turns"
    episodic: ClassVar[bool] = True

    max_turns: int | None = None
    max_observation: int = 64
    keep_context: bool | None = None
    history: bool = True

    def __post_init__(self):
        if self.keep_context and not self.history:
            raise ValueError(
                "keep_context=True goes on in one text, history=False forgets it: leave one of "
                "them out"
            )
        for name in ("max_turns", "max_observation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: choose 1 or more")
            if value is not None and value > LONGEST:
                raise ValueError(f"{name}={value}: choose {LONGEST} or less")
        if self.keep_context and self.formatter is not None and self.formatter.chat:
            raise ValueError(
                "keep_context=True goes on in one text, chat=True writes each turn's conversation "
                "anew: leave one of them out"
            )

    def for_run(self, formatter: PromptFormatter, config: Any) -> Self:
        keeps = self.keep_context
        if keeps is None:
            keeps = config.train in ("all", "lora") and not config.chat and self.history
        mine = super().for_run(formatter, config)
        return dataclasses.replace(mine, keep_context=keeps)

    @property
    def responses_per_row(self) -> int:
        return self.turn_limit if self.keep_context else 1

    @property
    def turn_limit(self) -> int:
        """Number of turns after which an episode is truncated."""
        return self.max_turns or _MAX_TURNS

    def for_task(self, task: Any) -> Self:
        return dataclasses.replace(
            self, max_turns=self.max_turns or getattr(task, "max_turns", None) or _MAX_TURNS
        )

    def collect(
        self,
        sampler: Sampler,
        task: Environment,
        problems: Sequence[Problem],
        counts: Sequence[int],
        seed: Sequence[int],
    ) -> list[Trajectory]:
        found = []
        limited = self.limited(task)
        for rollouts in rollout_batches(problems, counts, sampler.max_rows):
            play = self._in_one_row if self.keep_context else self._turn_by_turn
            found += play(sampler, limited, rollouts, seed)
        return found

    def _in_one_row(self, sampler, task, rollouts, seed) -> list[Trajectory]:
        episodes = [
            TrajectoryBuilder(rollout, self.formatter.prompt([rollout.problem.prompt]))
            for rollout in rollouts
        ]
        plays = begin_episodes(task, [rollout.problem for rollout in rollouts])
        texts, source = unique_prompts([episode.tokens for episode in episodes])
        capacity = self.turn_limit * (self.max_new_tokens + self.max_observation)
        keys = sampling_keys(rollouts, seed)
        conversation = sampler.open(texts, source, keys, capacity, self.turn_limit)
        for turn in range(self.turn_limit):
            active = np.array([not play.over for play in plays])
            if not active.any():
                break
            said = conversation.respond(self.max_new_tokens, active)
            going = np.flatnonzero(active).tolist()
            completions = [
                self.formatter.completion(rollouts[index].problem, said[index]) for index in going
            ]
            observations = act_all([plays[index] for index in going], completions)
            seen: list[list[int]] = [[] for _ in rollouts]
            for index, completion, observation in zip(
                going, completions, observations, strict=True
            ):
                episodes[index].respond(said[index], completion)
                if not plays[index].over and turn + 1 < self.turn_limit:
                    seen[index] = self.formatter.observation(observation, self.max_observation)
                    episodes[index].observe(seen[index])
            conversation.observe(seen)
        return [
            episode.trajectory(play.reward, tuple(play.rewards))
            for episode, play in zip(episodes, plays, strict=True)
        ]

    def _turn_by_turn(self, sampler, task, rollouts, seed) -> list[Trajectory]:
        plays = begin_episodes(task, [rollout.problem for rollout in rollouts])
        said: list[list[str]] = [[rollout.problem.prompt] for rollout in rollouts]
        turns: list[list[TrajectoryBuilder]] = [[] for _ in rollouts]
        for turn in range(self.turn_limit):
            going = [index for index, play in enumerate(plays) if not play.over]
            if not going:
                break
            first = 0 if self.history else -1
            prompts = [self.formatter.prompt(said[index][first:]) for index in going]
            texts, source = unique_prompts(prompts)
            keys = sampling_keys([rollouts[index] for index in going], (*seed, turn))
            conversation = sampler.open(texts, source, keys, self.max_new_tokens)
            answers = conversation.respond(self.max_new_tokens)
            completions = [
                self.formatter.completion(rollouts[index].problem, answer)
                for index, answer in zip(going, answers, strict=True)
            ]
            observations = act_all([plays[index] for index in going], completions)
            for index, prompt, answer, completion, observation in zip(
                going, prompts, answers, completions, observations, strict=True
            ):
                episode = TrajectoryBuilder(rollouts[index], prompt, turn)
                episode.respond(answer, completion)
                turns[index].append(episode)
                seen = self.formatter.cut(observation, self.max_observation)
                said[index] += [completion.text, seen]
        return [
            episode.trajectory(play.reward, tuple(play.rewards))
            for episodes, play in zip(turns, plays, strict=True)
            for episode in episodes
        ]


STRATEGIES = Registry[RolloutStrategy](
    "strategy", {strategy.word: strategy for strategy in (OneResponse, Turns)}
)
