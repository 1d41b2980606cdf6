"""Thoughtbubbles: residual streams that fork and die inside the network (arXiv 2510.00219)."""

from thoughtbubbles.config import PRESETS, ModelConfig
from thoughtbubbles.forking import merge
from thoughtbubbles.layers import Block, Fork
from thoughtbubbles.model import Output, Thoughtbubbles
from thoughtbubbles.policies import Candidates, Policy, TopK
from thoughtbubbles.streams import Streams

__all__ = [
    "PRESETS",
    "Block",
    "Candidates",
    "Fork",
    "ModelConfig",
    "Output",
    "Policy",
    "Streams",
    "Thoughtbubbles",
    "TopK",
    "merge",
]
