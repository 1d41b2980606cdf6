"""Retrofit: fork layers in a pretrained decoder, which leave its output unchanged at first.

A fork acts on other streams as one more key of attention, whose weight is exactly multiplied by the
fork's score p (`score_bias="none"`; values unscaled). In each fork layer, a learned scalar gate
scales p (`forking.candidate_log_scores`). Its initial value `GATE` makes the effect of every fork
smaller than float32's last digit. The output is linear in the gate to first order, so the gate has
a gradient like any other parameter, and the first step of an optimizer opens it; from then on
scores and fork embeddings learn too.

A fork itself is computed in full (`residual_scaling=False`). If a p near 0 scaled its residual
updates, it would carry its parent's residual through the network unchanged, and contribute nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from thoughtbubbles.config import ModelConfig
from thoughtbubbles.model import Thoughtbubbles
from thoughtbubbles.module import abstract_module
from thoughtbubbles.policies import PrefixRank
from thoughtbubbles.policy import Policy

GATE = 1e-9


def add_forks(
    config: ModelConfig,
    weights: Mapping[Any, Any],
    *,
    layers: Sequence[int],
    policy: Policy = PrefixRank(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> tuple[ModelConfig, dict[Any, Any]]:
    """Add fork layers to a decoder; its output stays the same until they are trained.

    Args:
        config: Config of a decoder without forks.
        weights: Weights of the decoder, a nested dict of arrays, such as `load_pretrained` returns,
            or an `nnx.State`; their arrays are kept as they are.
        layers: Indices of the blocks that get a fork layer in front, from 0, in rising order.
        policy: Policy of the fork layers.
        seed: Seed of the new parameters, which are float32 and replicated on the devices of the
            embedding.

    Returns:
        The new config, and the weights with one more entry, "forks", for those of the fork layers.

    Raises:
        ValueError: The config has fork layers or copies, `layers` is empty or has an index out of
            range, or the weights do not belong to the config.
    """
    if config.fork_layers:
        raise ValueError(
            f"the model forks before layers {config.fork_layers} already: take one without forks"
        )
    if not layers:
        raise ValueError(f"layers={layers}: name the blocks to fork before, such as (10, 20)")
    forking = forking_config(config, layers, policy)
    if isinstance(weights, nnx.State):
        weights = nnx.to_pure_dict(weights)
    abstract_module(lambda: Thoughtbubbles.from_params(config, weights))  # raises if they don't fit

    def forks() -> Any:
        # XLA computes what is returned, so the rest of the model costs nothing.
        model = Thoughtbubbles(forking, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model))["forks"]

    replicated = _replicated_like(weights["embed"])
    return forking, {**weights, "forks": jax.jit(forks, out_shardings=replicated)()}


def forking_config(config: ModelConfig, layers: Sequence[int], policy: Policy) -> ModelConfig:
    """Return the config with fork layers that leave the output unchanged at first."""
    return dataclasses.replace(
        config,
        fork_layers=tuple(layers),
        policy=policy,
        fork_gate=GATE,
        score_originals=False,
        score_bias="none",
        value_scaling=False,
        residual_scaling=False,
        merge="rightmost",
    )


def _replicated_like(array: Any) -> Any:
    """Return the sharding that replicates arrays on the devices of this one."""
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
