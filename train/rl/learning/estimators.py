"""Advantage estimators by name: `--advantage "rebn(gamma=0.9)"`."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from train.rl.learning import advantages
from train.rl.learning.credit import (
    spread_over_tokens,
    token_advantages,
    turn_advantages,
    whiten_tokens,
)
from train.rl.learning.critic import ValueLoss
from train.rl.types import Episodes, Trajectory


@dataclasses.dataclass(frozen=True)
class Advantage:
    """Base of all advantage estimators.

    A new one is a frozen dataclass with a `word`, options as fields, and `estimate`, or `of_tokens`
    where tokens of one episode differ. `ADVANTAGES[word]` makes it known to `--advantage`.
    """

    word: ClassVar[str]
    """Name of the estimator on the command line and in configs."""

    compares: ClassVar[bool] = True
    """Whether rollouts of one problem are compared, so that a problem needs two or more."""

    by_turn: ClassVar[bool] = False
    """Whether the rewards of turns are used in place of the shaped rewards of episodes."""

    @property
    def critic(self) -> ValueLoss | None:
        """Loss of the value head that the estimator needs on the policy; None for no such head."""
        return None

    @property
    def value_rate(self) -> float | None:
        """Peak learning rate of the value head; None for that of the policy."""
        return None

    def value_targets(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        """Returns `[L]` float64 that a value head learns to predict; arguments as `of_tokens`."""
        raise NotImplementedError(f"{type(self).__name__} has no value head")

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Advantage of each episode, `[N]` float64 (`train.rl.learning.advantages`).

        Args:
            reward: Shaped reward of each episode, `[N]` float64.
            group: Problem of each episode, `[N]` int.
            valid: Episodes that count, `[N]` bool.
        """
        raise NotImplementedError(f"{type(self).__name__} estimates no advantages")

    def of_tokens(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        """Advantages `[L]` float64 of the tokens of each trajectory: those of its episode.

        Args:
            trajectories: Rows that are trained on.
            episodes: The `N` episodes that the rows are parts of.
            reward: Shaped reward of each episode, `[N]` float64.
        """
        found = self.estimate(reward, episodes.group, episodes.valid)
        return spread_over_tokens(found, trajectories, episodes)


@dataclasses.dataclass(frozen=True)
class GroupNormalized(Advantage):
    """Deviation from the mean of the group over its standard deviation (GRPO)."""

    word: ClassVar[str] = "grpo"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.grpo(reward, group, valid)


@dataclasses.dataclass(frozen=True)
class GroupCentered(Advantage):
    """Deviation from the mean of the group (Dr. GRPO)."""

    word: ClassVar[str] = "dr_grpo"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.dr_grpo(reward, group, valid)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """Deviation from the mean of the other rollouts of the group (RLOO)."""

    word: ClassVar[str] = "rloo"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.rloo(reward, group, valid)


@dataclasses.dataclass(frozen=True)
class BatchNormalized(Advantage):
    """Deviation from the mean of the group over the batch's standard deviation (REINFORCE++)."""

    word: ClassVar[str] = "reinforce_pp"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.reinforce_pp_baseline(reward, group, valid)


@dataclasses.dataclass(frozen=True)
class ReturnBatchNormalized(Advantage):
    """Discounted return of a turn, normalised over all turns of the batch (GEM's ReBN).

    Attributes:
        gamma: Discount of the rewards of later turns (γ), above 0 and at most 1.
    """

    word: ClassVar[str] = "rebn"
    compares: ClassVar[bool] = False
    by_turn: ClassVar[bool] = True

    gamma: float = 1.0

    def __post_init__(self):
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: choose more than 0 and at most 1")

    def of_tokens(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        return turn_advantages(trajectories, episodes, self.gamma)


@dataclasses.dataclass(frozen=True)
class TreeCentered(Advantage):
    """Value of a token's node minus the mean outcome of the tree's terminals (DeepSearch).

    Without a tree, the deviation of the reward from the mean of the group.

    Attributes:
        one_sided: Advantages in a tree whose terminals all agree: "zero", as in any group, or
            "keep", as in the authors' code, which reinforces the prefixes of a tree that only fails
            and weakens those of one that only succeeds.
    """

    word: ClassVar[str] = "tree"

    one_sided: Literal["zero", "keep"] = "zero"

    def __post_init__(self):
        if self.one_sided not in ("zero", "keep"):
            raise ValueError(f"one_sided={self.one_sided!r}: choose zero or keep")

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.dr_grpo(reward, group, valid)

    def of_tokens(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        found = super().of_tokens(trajectories, episodes, reward)
        shaped = reward - episodes.reward
        for group in np.unique(episodes.group):
            mine = np.flatnonzero(episodes.group == group).tolist()
            rows = [trajectories[row] for episode in mine for row in episodes.rows[episode]]
            if any(row.node_values is None for row in rows):
                continue
            agree = len(set(episodes.success[mine].tolist())) == 1
            outcome = np.where(episodes.success[mine], 1.0, -1.0) + shaped[mine]
            for episode in mine:
                for row in episodes.rows[episode]:
                    values = trajectories[row].node_values
                    assert values is not None
                    found[row] = values + shaped[episode] - outcome.mean()
                    if agree and self.one_sided == "zero":
                        found[row] = np.zeros_like(values)
        return found


@dataclasses.dataclass(frozen=True)
class GAE(Advantage):
    """Generalised advantage estimation by a value head on the policy (PPO).

    A step is a token, as in TRL and verl: δ_t = r_t + γ_t V_{t+1} - V_t, A_t = δ_t + γ_t λ A_{t+1}
    over all tokens that the policy generated in an episode. The discount counts turns, not tokens:
    γ_t is `gamma` at the last token of a turn and 1 elsewhere. So `gamma` means what it means in
    `rebn`, long responses are not worth less, and with λ = 1 and no values the advantage of a
    token is the discounted return of its turn. Prompts, observations and latents are no steps.

    Attributes:
        gamma: Discount of the rewards of later turns (γ), above 0 and at most 1.
        lam: Decay of the TD errors of later tokens (λ), from 0 to 1.
        whiten: Whether advantages are brought to mean 0 and standard deviation 1 over all tokens of
            the batch. What the value head learns to predict, A_t + V_t, is not whitened.
        value_clip: Clipping range of values around those that the batch was collected with, in
            units of the reward (TRL: 0.2); None for none.
        value_coef: Weight of the value loss, ½ of a squared error, beside the policy's loss.
        value_learning_rate: Peak learning rate of the value head, on the schedule of the policy's;
            None for that of the policy. The decoder keeps the policy's in either case.
    """

    word: ClassVar[str] = "gae"
    compares: ClassVar[bool] = False

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    value_clip: float | None = 0.2
    value_coef: float = 0.5
    value_learning_rate: float | None = None

    def __post_init__(self):
        rate = self.value_learning_rate
        if rate is not None and not 0 < rate < np.inf:
            raise ValueError(
                f"value_learning_rate={rate}: choose more than 0, or None for the policy's"
            )
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: choose more than 0 and at most 1")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam={self.lam}: choose from 0 to 1")
        _ = self.critic  # which checks the options that are its

    @property
    def critic(self) -> ValueLoss:
        return ValueLoss(self.value_clip, self.value_coef)

    @property
    def value_rate(self) -> float | None:
        return self.value_learning_rate

    def of_tokens(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        found = token_advantages(trajectories, episodes, reward, self.gamma, self.lam)
        return whiten_tokens(trajectories, found) if self.whiten else found

    def value_targets(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        found = token_advantages(trajectories, episodes, reward, self.gamma, self.lam)
        return [
            advantage if row.values is None else advantage + row.values
            for row, advantage in zip(trajectories, found, strict=True)
        ]


ADVANTAGES: dict[str, type[Advantage]] = {
    advantage.word: advantage
    for advantage in (
        GroupNormalized, GroupCentered, LeaveOneOut, BatchNormalized, ReturnBatchNormalized,
        TreeCentered, GAE,
    )
}  # fmt: skip
