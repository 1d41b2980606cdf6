"""Changes of a reward's value that tasks make: by outcome, for a well-formed text."""

import dataclasses

from train.rl.types import Reward


def ternary(
    reward: Reward, abstained: bool, right: float = 1.0, abstain: float = 0.0, wrong: float = -1.0
) -> Reward:
    """Value by outcome (TruthRL, arXiv 2509.25760): `right` where `reward` has a success.

    What counts as success is left as it is.
    """
    value = abstain if abstained else right if reward.success else wrong
    return dataclasses.replace(reward, value=value)


def format_bonus(reward: Reward, well_formed: bool, bonus: float) -> Reward:
    """`bonus` more for a well-formed text, right or wrong; its share is `well_formed`."""
    info = {**reward.info, "well_formed": float(well_formed)}
    return dataclasses.replace(reward, value=reward.value + bonus * well_formed, info=info)
