"""Bonus that tasks add to the reward of well-formed responses."""

import dataclasses

from train.rl.types import Reward


def format_bonus(reward: Reward, well_formed: bool, bonus: float) -> Reward:
    """Add `bonus` to a reward if the text is well-formed; info gets `well_formed`, 1 or 0."""
    info = {**reward.info, "well_formed": float(well_formed)}
    return dataclasses.replace(reward, value=reward.value + bonus * well_formed, info=info)
