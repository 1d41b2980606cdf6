"""Methods of reinforcement learning by name, one file each: `--method "dapo(clip_high=0.3)"`."""

from thoughtbubbles.registry import Registry
from train.rl.methods.brorl import BroRL
from train.rl.methods.dapo import DAPO
from train.rl.methods.deepsearch import DeepSearch
from train.rl.methods.dr_grpo import DrGRPO
from train.rl.methods.grpo import GRPO
from train.rl.methods.knapsack import KnapsackGRPO
from train.rl.methods.method import Method, Parts
from train.rl.methods.ppo import PPO
from train.rl.methods.rebn import ReBN
from train.rl.methods.reinforce_pp import ReinforcePP
from train.rl.methods.rloo import RLOO
from train.rl.methods.trigger import TriggerGRPO
from train.rl.methods.truthrl import TruthRL

__all__ = [
    "DAPO",
    "GRPO",
    "METHODS",
    "PPO",
    "RLOO",
    "BroRL",
    "DeepSearch",
    "DrGRPO",
    "KnapsackGRPO",
    "Method",
    "Parts",
    "ReBN",
    "ReinforcePP",
    "TriggerGRPO",
    "TruthRL",
]

METHODS = Registry[Method](
    "method",
    {
        method.word: method
        for method in (
            GRPO, DrGRPO, RLOO, DAPO, ReinforcePP, ReBN, TriggerGRPO, KnapsackGRPO, BroRL, TruthRL,
            DeepSearch, PPO,
        )
    },
)  # fmt: skip
