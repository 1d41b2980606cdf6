"""Rollout strategies by name: one response to a problem, or an episode of several turns."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data.chat_templates import chat_ids
from train.models.load import LanguageModel
from train.rl.protocols import Environment, Task
from train.rl.rollout.sampler import Sampled, Sampler, row_keys
from train.rl.scoring import safe_score, safe_step
from train.rl.types import Completion, Problem, Reward, Trajectory, Turn


@dataclasses.dataclass(frozen=True)
class PromptFormatter:
    """Translation of texts to ids and back.

    Attributes:
        lm: Language model whose tokenizer is used.
        chat: Whether prompts are messages to the model, in its chat template.
    """

    lm: LanguageModel
    chat: bool = False

    def prompt(self, messages: Sequence[str]) -> list[int]:
        """Ids of a conversation of user, policy, user and so on, up to the policy's response."""
        if not self.chat:
            return self.lm.prompt("".join(messages))
        tokenizer = self.lm.tokenizer
        if not isinstance(tokenizer, PretrainedTokenizer):
            raise ValueError("chat=True needs weights with a chat template: leave chat out")
        roles = itertools.cycle(("user", "assistant"))
        said = [
            {"role": role, "content": text} for role, text in zip(roles, messages, strict=False)
        ]
        return chat_ids(tokenizer, said)

    def observation(self, text: str, limit: int) -> list[int]:
        """Ids of an observation in the middle of a text, at most `limit` of them."""
        return self.lm.tokenizer.encode(text)[0].tolist()[:limit]

    def cut(self, text: str, limit: int) -> str:
        """Text of the first `limit` ids of an observation."""
        return self.lm.tokenizer.decode(self.observation(text, limit))

    def completion(self, problem: Problem, sampled: Sampled) -> Completion:
        """A sampled response as text."""
        ids = sampled.tokens.tolist()
        finished = bool(ids) and ids[-1] in self.lm.stop_ids
        text = self.lm.tokenizer.decode(ids[:-1] if finished else ids)
        return Completion(problem, text, tuple(ids), finished)


@dataclasses.dataclass(frozen=True)
class Row:
    """One rollout to make."""

    group: int
    problem: Problem
    number: int  # among the problem's rollouts


def _rows(problems: Sequence[Problem], counts: Sequence[int], most: int) -> Iterator[list[Row]]:
    """All rows, at most `most` at a time; the rollouts of a problem are neighbours.

    A problem that comes twice goes on counting, so that no two rows have one key.
    """
    seen: dict[str, int] = {}
    rows = []
    for group, (problem, count) in enumerate(zip(problems, counts, strict=True)):
        first = seen.get(problem.uid, 0)
        seen[problem.uid] = first + count
        rows += [Row(group, problem, first + number) for number in range(count)]
    for start in range(0, len(rows), most):
        yield rows[start : start + most]


def _keys(rows: Sequence[Row], seed: Sequence[int]) -> Any:
    return row_keys(seed, [row.problem.uid for row in rows], [row.number for row in rows])


def _shared(texts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """The different texts, and the index among them of each text."""
    found: dict[tuple[int, ...], int] = {}
    source = [found.setdefault(tuple(text), len(found)) for text in texts]
    return [list(text) for text in found], source


@dataclasses.dataclass(frozen=True)
class RolloutStrategy:
    """Base of all strategies.

    A new one is a frozen dataclass with a `word`, options as fields, and `collect`.
    `STRATEGIES[word]` makes it known to `--strategy`. What it keeps between steps stands in a field
    that is no option, `field(default_factory=dict, init=False, repr=False, compare=False)`, and is
    saved by `state` and `restore`; each run has a copy of its own.

    Attributes:
        formatter: Translation of texts to ids; set by the run.
        max_new_tokens: Longest response, in tokens; set by the run.
    """

    word: ClassVar[str]
    """Name of the strategy on the command line and in configs."""

    episodic: ClassVar[bool] = False
    """Whether it plays environments, not tasks of one response."""

    _: dataclasses.KW_ONLY
    formatter: PromptFormatter = dataclasses.field(default=cast(Any, None), repr=False)
    max_new_tokens: int = dataclasses.field(default=64, repr=False)

    def for_run(self, formatter: PromptFormatter, config: Any) -> Self:
        """A copy for one run.

        Args:
            formatter: Translation of texts to ids.
            config: Config of the run (`RLConfig`).
        """
        return dataclasses.replace(self, formatter=formatter, max_new_tokens=config.max_new_tokens)

    @property
    def responses_per_row(self) -> int:
        """Greatest number of responses in one row."""
        return 1

    def collect(
        self,
        sampler: Sampler,
        task: Any,
        problems: Sequence[Problem],
        counts: Sequence[int],
        seed: Sequence[int],
    ) -> list[Trajectory]:
        """Rollouts of problems, `counts[i]` of `problems[i]`, all of group `i`.

        Args:
            sampler: Sampler of the present weights.
            task: A `Task` or an `Environment`.
            problems: Problem of each group.
            counts: Number of rollouts of each problem.
            seed: Numbers that all randomness is derived from.
        """
        raise NotImplementedError(f"{type(self).__name__} collects no rollouts")

    @property
    def state(self) -> Any:
        """What is kept between steps, as JSON for checkpoints."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from the `state` of a checkpoint."""


@dataclasses.dataclass(frozen=True)
class OneResponse(RolloutStrategy):
    """One response to the problem's prompt, which is prefilled once for all rollouts."""

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
        for rows in _rows(problems, counts, sampler.max_rows):
            texts, source = _shared([prompts[row.group] for row in rows])
            conversation = sampler.open(texts, source, _keys(rows, seed), self.max_new_tokens)
            for row, sampled in zip(rows, conversation.respond(self.max_new_tokens), strict=True):
                completion = self.formatter.completion(row.problem, sampled)
                reward = safe_score(task, completion)
                episode = _Episode(row, prompts[row.group])
                episode.respond(sampled, completion)
                found.append(episode.trajectory(reward, (reward.value,)))
        return found


@dataclasses.dataclass(frozen=True)
class Turns(RolloutStrategy):
    """An episode of several turns in an environment.

    Attributes:
        max_turns: Number of turns after which an episode is cut.
        max_observation: Greatest number of tokens of an observation; the rest is cut off.
        keep_context: Whether turns go on in one row, with the keys, values and latents so far, and
            an episode is one row for the learner. Otherwise each turn begins anew with the text so
            far, without earlier latents (the authors' MemGen), and is a row of its own. None keeps
            the context where there is neither latent memory nor a chat template.
    """

    word: ClassVar[str] = "turns"
    episodic: ClassVar[bool] = True

    max_turns: int = 8
    max_observation: int = 64
    keep_context: bool | None = None

    def __post_init__(self):
        for name in ("max_turns", "max_observation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more")
        if self.keep_context and self.formatter is not None and self.formatter.chat:
            raise ValueError(
                "keep_context=True goes on in one text, chat=True writes each turn's conversation "
                "anew: leave one of them out"
            )

    def for_run(self, formatter: PromptFormatter, config: Any) -> Self:
        keeps = self.keep_context
        if keeps is None:
            keeps = config.train in ("all", "lora") and not config.chat
        mine = super().for_run(formatter, config)
        return dataclasses.replace(mine, keep_context=keeps)

    @property
    def responses_per_row(self) -> int:
        return self.max_turns if self.keep_context else 1

    def collect(
        self,
        sampler: Sampler,
        task: Environment,
        problems: Sequence[Problem],
        counts: Sequence[int],
        seed: Sequence[int],
    ) -> list[Trajectory]:
        found = []
        for rows in _rows(problems, counts, sampler.max_rows):
            play = self._in_one_row if self.keep_context else self._turn_by_turn
            found += play(sampler, task, rows, seed)
        return found

    def _in_one_row(self, sampler, task, rows, seed) -> list[Trajectory]:
        episodes = [_Episode(row, self.formatter.prompt([row.problem.prompt])) for row in rows]
        plays = [_Play(task, row.problem) for row in rows]
        texts, source = _shared([episode.tokens for episode in episodes])
        capacity = self.max_turns * (self.max_new_tokens + self.max_observation)
        conversation = sampler.open(texts, source, _keys(rows, seed), capacity, self.max_turns)
        for turn in range(self.max_turns):
            active = np.array([not play.over for play in plays])
            if not active.any():
                break
            said = conversation.respond(self.max_new_tokens, active)
            seen: list[list[int]] = [[] for _ in rows]
            for index in np.flatnonzero(active):
                episode, play = episodes[index], plays[index]
                completion = self.formatter.completion(episode.row.problem, said[index])
                episode.respond(said[index], completion)
                observation = play.act(completion)
                if not play.over and turn + 1 < self.max_turns:
                    seen[index] = self.formatter.observation(observation, self.max_observation)
                    episode.observe(seen[index])
            conversation.observe(seen)
        return [
            episode.trajectory(play.reward, tuple(play.rewards))
            for episode, play in zip(episodes, plays, strict=True)
        ]

    def _turn_by_turn(self, sampler, task, rows, seed) -> list[Trajectory]:
        plays = [_Play(task, row.problem) for row in rows]
        said: list[list[str]] = [[row.problem.prompt] for row in rows]
        turns: list[list[_Episode]] = [[] for _ in rows]
        for turn in range(self.max_turns):
            going = [index for index, play in enumerate(plays) if not play.over]
            if not going:
                break
            prompts = [self.formatter.prompt(said[index]) for index in going]
            texts, source = _shared(prompts)
            keys = _keys([rows[index] for index in going], (*seed, turn))
            conversation = sampler.open(texts, source, keys, self.max_new_tokens)
            answers = conversation.respond(self.max_new_tokens)
            for index, prompt, answer in zip(going, prompts, answers, strict=True):
                completion = self.formatter.completion(rows[index].problem, answer)
                episode = _Episode(rows[index], prompt, turn)
                episode.respond(answer, completion)
                turns[index].append(episode)
                seen = self.formatter.cut(plays[index].act(completion), self.max_observation)
                said[index] += [completion.text, seen]
        return [
            episode.trajectory(play.reward, tuple(play.rewards))
            for episodes, play in zip(turns, plays, strict=True)
            for episode in episodes
        ]


STRATEGIES: dict[str, type[RolloutStrategy]] = {
    strategy.word: strategy for strategy in (OneResponse, Turns)
}


class _Play:
    """An episode of an environment that is being played."""

    def __init__(self, task: Environment, problem: Problem):
        self._task, self._problem = task, problem
        self._state = task.reset(problem)
        self.rewards: list[float] = []
        self.over = False
        self._last: Turn | None = None

    def act(self, completion: Completion) -> str:
        """Take a turn; returns the observation."""
        turn = safe_step(self._task, self._problem, self._state, completion)
        self._state, self._last = turn.state, turn
        self.rewards.append(turn.reward)
        self.over = turn.terminated or turn.truncated
        return turn.observation

    @property
    def reward(self) -> Reward:
        """Reward of the whole episode."""
        last = self._last
        assert last is not None
        info = {"turns": float(len(self.rewards)), **last.info}
        return Reward(float(sum(self.rewards)), last.success, info)


class _Episode:
    """A trajectory that is being assembled."""

    def __init__(self, row: Row, prompt: Sequence[int], turn: int = 0):
        self.row, self._turn = row, turn
        self.tokens = list(prompt)
        self._log_probs = [0.0] * len(prompt)
        self._trained = [False] * len(prompt)
        self._decisions = [-1] * len(prompt)
        self._begins: list[int] = []
        self._texts: list[str] = []
        self._finished = False

    def observe(self, ids: Sequence[int]) -> None:
        self._add(ids, [0.0] * len(ids), [-1] * len(ids), False)

    def respond(self, sampled: Sampled, completion: Completion) -> None:
        self._begins.append(len(self.tokens))
        self._texts.append(completion.text)
        self._finished = completion.finished
        self._add(sampled.tokens, sampled.log_probs, sampled.decisions, True)

    def _add(self, ids, log_probs, decisions, trained) -> None:
        self.tokens += list(map(int, ids))
        self._log_probs += list(log_probs)
        self._decisions += list(decisions)
        self._trained += [trained] * len(ids)

    def trajectory(self, reward: Reward, turn_rewards: tuple[float, ...]) -> Trajectory:
        return Trajectory(
            group=self.row.group,
            problem=self.row.problem,
            tokens=np.array(self.tokens, np.int32),
            trained=np.array(self._trained, bool),
            log_probs=np.array(self._log_probs, np.float32),
            decisions=np.array(self._decisions, np.int8),
            begins=tuple(self._begins),
            reward=reward,
            finished=self._finished,
            texts=tuple(self._texts),
            turn_rewards=turn_rewards,
            turn=self._turn,
            episode=self.row.number,
        )
