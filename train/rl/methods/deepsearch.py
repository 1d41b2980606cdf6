"""DeepSearch: tree search during training (arXiv 2509.25454)."""

import dataclasses
from typing import ClassVar, Literal

from train.rl.learning.estimators import Advantage, TreeCentered
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method
from train.rl.rollout.search import OPTIONS, TreeSearch, TreeSearchOptions
from train.rl.rollout.strategies import RolloutStrategy


@dataclasses.dataclass(frozen=True)
class DeepSearch(TreeSearchOptions, Method):
    """Tree search for hard problems, with an advantage for each node of a tree.

    A search ends when its tree has backed up as many terminals as the problem has rollouts
    (`num_generations`, or the allocator's number); the paths to these terminals are the rollouts.
    Solutions of hard problems are kept and trained on again at later visits. Problems that direct
    rollouts solve more often than `threshold` are set aside.

    Attributes:
        one_sided: Advantages in a tree whose terminals all succeed or all fail: "zero" sets them to
            0, "keep" keeps them. With `filter_groups` such trees are left out.
    """

    word: ClassVar[str] = "deepsearch"

    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    aggregate: Aggregate = "token"
    one_sided: Literal["zero", "keep"] = "zero"

    def __post_init__(self):
        super().__post_init__()
        Method.__post_init__(self)

    @property
    def strategy(self) -> RolloutStrategy:
        return TreeSearch(**{name: getattr(self, name) for name in OPTIONS})

    @property
    def advantage(self) -> Advantage:
        return TreeCentered(self.one_sided)
