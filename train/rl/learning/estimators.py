"""Advantage estimators by name: `--advantage "rebn(gamma=0.9)"`."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from thoughtbubbles.registry import Registry
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
    """Base of all advantage estimators, which turn rewards of episodes into advantages of tokens.

    A new estimator is a frozen dataclass with a `word` and with options as fields. It overrides
    `estimate`, or `of_tokens` if the tokens of one episode have different advantages. Adding the
    class as `ADVANTAGES[word]` makes it known to `--advantage`.
    """

    word: ClassVar[str]
    """Name of the estimator on the command line and in configs."""

    compares: ClassVar[bool] = True
    """Whether rollouts of one problem are compared, so that a problem needs at least two."""

    by_turn: ClassVar[bool] = False
    """Whether the estimator uses the rewards of turns, not the shaped rewards of episodes."""

    @property
    def value_loss(self) -> ValueLoss | None:
        """Loss of the value head, for an estimator that needs one on the policy; else None."""
        return None

    @property
    def value_rate(self) -> float | None:
        """Peak learning rate of the value head; None for the policy's learning rate."""
        return None

    def value_targets(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        """Compute the returns that a value head learns to predict.

        Arguments and shapes are as in `of_tokens`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no value head")

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Estimate the advantage of each episode, `[N]` float64.

        Args:
            reward: Shaped reward of each of `N` episodes, `[N]` float64.
            group: Index of the problem of each episode, `[N]` int.
            valid: Episodes that are not padding, `[N]` bool.
        """
        raise NotImplementedError(f"{type(self).__name__} estimates no advantages")

    def of_tokens(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        """Estimate advantages of tokens: by default, each token has the advantage of its episode.

        Args:
            trajectories: Rows that are trained on.
            episodes: The `N` episodes that the rows belong to.
            reward: Shaped reward of each episode, `[N]` float64.

        Returns:
            Advantages of the tokens of each trajectory, `[L]` float64 for a trajectory of `L`
            tokens.
        """
        found = self.estimate(reward, episodes.group, episodes.valid)
        return spread_over_tokens(found, trajectories, episodes)


@dataclasses.dataclass(frozen=True)
class GroupNormalized(Advantage):
    """Reward minus the mean reward of the group, divided by the group's std (GRPO)."""

    word: ClassVar[str] = "grpo"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.grpo(reward, group, valid)


@dataclasses.dataclass(frozen=True)
class GroupCentered(Advantage):
    """Reward minus the mean reward of the group (Dr. GRPO)."""

    word: ClassVar[str] = "dr_grpo"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.dr_grpo(reward, group, valid)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """Reward minus the mean reward of the other rollouts of the group (RLOO)."""

    word: ClassVar[str] = "rloo"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.rloo(reward, group, valid)


@dataclasses.dataclass(frozen=True)
class BatchNormalized(Advantage):
    """Reward minus the group mean, divided by the batch std of these differences (REINFORCE++)."""

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
    """Value of a token's tree node minus the mean outcome of the group's terminals (DeepSearch).

    The outcome of a terminal is 1 for a success and -1 for a failure, plus the change by reward
    shaping, which is also added to the node values of the terminal's episode. In a group without a
    tree, the advantage is the reward minus the mean reward of the group.

    Attributes:
        one_sided: Advantages in a tree whose terminals all succeed or all fail: "zero" sets the
            advantages to 0, as for any group of equal rewards; "keep" leaves them, as in the
            authors' code, which reinforces prefixes where all terminals fail and weakens prefixes
            where all succeed.
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
    """Generalised advantage estimation with a value head on the policy (PPO).

    A step is a token, as in TRL and verl: δ_t = r_t + γ_t V_{t+1} - V_t, A_t = δ_t + γ_t λ A_{t+1}
    over all tokens that the policy generated in an episode. Prompts, observations and latents are
    not steps. Discounting is per turn, not per token: γ_t is `gamma` at the last token of a turn
    and 1 elsewhere. `gamma` therefore has the same meaning as in `rebn`, and long responses are not
    discounted more. With λ = 1 and all values 0, the advantage of a token (before whitening) is the
    discounted return of its turn.

    Attributes:
        gamma: Discount of the rewards of later turns (γ), above 0 and at most 1.
        lam: Decay of the TD errors of later tokens (λ), from 0 to 1.
        whiten: Whether advantages are normalised to mean 0 and standard deviation 1 over all
            generated tokens of the batch. The targets of the value head, A_t + V_t, are not
            normalised.
        value_clip: Clipping range of a value around its value when the batch was collected, in
            units of the reward (TRL: 0.2); None for no clipping.
        value_coef: Weight of the value loss, half a squared error, relative to the policy's loss.
        value_learning_rate: Peak learning rate of the value head, with the policy's schedule; None
            for the policy's learning rate. The rest of the policy is not affected.
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
        _ = self.value_loss  # its constructor checks the options of the value loss

    @property
    def value_loss(self) -> ValueLoss:
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


ADVANTAGES = Registry[Advantage](
    "advantage",
    {
        advantage.word: advantage
        for advantage in (
            GroupNormalized, GroupCentered, LeaveOneOut, BatchNormalized, ReturnBatchNormalized,
            TreeCentered, GAE,
        )
    },
)  # fmt: skip
