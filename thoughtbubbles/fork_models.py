"""Functions for models with fork layers and blocks of any kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import jax

from thoughtbubbles.policy import CausalPolicy, Policy, hook


class ForkingConfig(Protocol):
    """Part of a model's config that describes its fork layers."""

    @property
    def fork_layers(self) -> Sequence[int]:
        """Indices of the blocks that a fork layer precedes."""
        ...

    @property
    def policy(self) -> Policy:
        """Policy of all fork layers."""
        ...

    @property
    def causal(self) -> bool:
        """Whether the model's output at a position is independent of later tokens."""
        ...


Model = TypeVar("Model", bound=Any)


def with_policy(model: Model, policy: Policy) -> Model:
    """Return a model with another fork policy, which shares the model's arrays, for inference.

    Args:
        model: Model with `forks`, its fork layers, and `config`, a dataclass with a field `policy`.
        policy: Policy of all fork layers of the returned model.

    Raises:
        ValueError: The policy tracks a threshold, as `Threshold` does, and the fork layers have no
            threshold.
    """
    tracks = hook(policy, "init_tracked")() is not None
    if tracks and any(fork.threshold is None for fork in model.forks):
        raise ValueError(
            f"{policy} needs fork layers with a threshold, a model of {model.config.policy} has "
            "none: take a model trained with Threshold, or PrefixRank as the policy"
        )
    leaves, structure = jax.tree.flatten(model)
    copy = jax.tree.unflatten(structure, leaves)
    copy.config = dataclasses.replace(model.config, policy=policy)
    for fork in copy.forks:
        fork.policy = policy
        fork.threshold = fork.threshold if tracks else None
    return copy


def cacheable(config: ForkingConfig) -> bool:
    """Whether decoding with a cache gives the results of a forward pass for this config."""
    return config.causal and (not config.fork_layers or isinstance(config.policy, CausalPolicy))


def check_cacheable(config: ForkingConfig) -> None:
    """Raise a ValueError unless a model of this config is `cacheable`."""
    if not config.causal:
        raise ValueError(
            f"{config.policy} can't be cached, its choice looks at the whole row: use "
            "model.with_policy(PrefixRank(...)) or Threshold, or generate(..., cached=False)"
        )
    if not cacheable(config):
        raise ValueError(
            f"{config.policy} is causal but has no init_state() and keep_next(): add both, or use "
            "generate(..., cached=False)"
        )
