"""Thoughtbubbles: residual streams that fork and die inside the network (arXiv 2510.00219)."""

from thoughtbubbles.architecture import ARCHITECTURES, Architecture, ArchitectureConfig
from thoughtbubbles.backbone import Backbone
from thoughtbubbles.config import PRESETS, ModelConfig
from thoughtbubbles.fork_cache import ForkCache, KVSlots, token_slots
from thoughtbubbles.forking import merge
from thoughtbubbles.layers import Block, Fork
from thoughtbubbles.model import Output, Thoughtbubbles
from thoughtbubbles.policies import PrefixRank, Threshold, TopK
from thoughtbubbles.policy import Candidates, CausalPolicy, Policy, PolicyDefaults
from thoughtbubbles.rows import join_segments, left_align, restore_alignment, split_segments
from thoughtbubbles.streams import Streams

__version__ = "0.1.0"

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ArchitectureConfig",
    "PRESETS",
    "Backbone",
    "Block",
    "Candidates",
    "CausalPolicy",
    "Fork",
    "ForkCache",
    "KVSlots",
    "ModelConfig",
    "Output",
    "Policy",
    "PolicyDefaults",
    "PrefixRank",
    "Streams",
    "Thoughtbubbles",
    "Threshold",
    "TopK",
    "join_segments",
    "left_align",
    "merge",
    "restore_alignment",
    "split_segments",
    "token_slots",
]
