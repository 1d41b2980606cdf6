"""Changes of a reward's value that tasks make: for a well-formed text."""

import dataclasses

from train.rl.types import Reward


def format_bonus(reward: Reward, well_formed: bool, bonus: float) -> Reward:
    """Reward with `bonus` added for a well-formed text, right or wrong; info gets `well_formed`."""
    info = {**reward.info, "well_formed": float(well_formed)}
    return dataclasses.replace(reward, value=reward.value + bonus * well_formed, info=info)
