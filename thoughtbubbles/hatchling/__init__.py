"""Dragon Hatchling (BDH, arXiv 2509.26507): a language model with linear attention over neurons."""

from thoughtbubbles.architecture import ARCHITECTURES
from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.hatchling.forking import ForkingHatchling, ForkingHatchlingConfig
from thoughtbubbles.hatchling.growth import grow, merge
from thoughtbubbles.hatchling.model import Hatchling
from thoughtbubbles.hatchling.state import Activations, Neurons, State

ARCHITECTURES["hatchling"] = Hatchling

__all__ = [
    "Activations",
    "ForkingHatchling",
    "ForkingHatchlingConfig",
    "Hatchling",
    "HatchlingConfig",
    "Neurons",
    "State",
    "grow",
    "merge",
]
