"""Changes of a reward's value that tasks make: by outcome, for a well-formed text."""

import dataclasses

from train.rl.types import Reward


def ternary(
    reward: Reward, abstained: bool, right: float = 1.0, abstain: float = 0.0, wrong: float = -1.0
) -> Reward:
    """Reward by outcome (TruthRL, arXiv 2509.25760); its success stays.

    Args:
        reward: Reward whose success says whether the answer is right.
        abstained: Whether the policy abstained.
        right: Value of a right answer.
        abstain: Value of abstaining.
        wrong: Value of a wrong answer.
    """
    value = abstain if abstained else right if reward.success else wrong
    return dataclasses.replace(reward, value=value)


def format_bonus(reward: Reward, well_formed: bool, bonus: float) -> Reward:
    """Reward with `bonus` added for a well-formed text, right or wrong; info gets `well_formed`."""
    info = {**reward.info, "well_formed": float(well_formed)}
    return dataclasses.replace(reward, value=reward.value + bonus * well_formed, info=info)
