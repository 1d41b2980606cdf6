"""Retrofit: add fork layers to a pretrained decoder that leave its output unchanged at first.

A fork affects other streams as one more key in attention. The fork's score p exactly multiplies the
unnormalised attention probability of this key (`score_bias="none"`; values unscaled). In each fork
layer, a learned scalar gate scales p (`forking.candidate_log_scores`). The gate's initial value
`GATE` makes the effect of every fork smaller than float32's last digit. The output is linear in the
gate to first order, so the gate has a gradient like any other parameter, and the first optimizer
step opens it; from then on, scores and fork embeddings are learned too.

The residual updates of a fork are not scaled by p (`residual_scaling=False`). If they were scaled
by a p near 0, the fork would carry its parent's residual through the network unchanged, and
contribute nothing.
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
    params: Mapping[Any, Any],
    *,
    layers: Sequence[int],
    policy: Policy = PrefixRank(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> tuple[ModelConfig, dict[Any, Any]]:
    """Add fork layers to a decoder; its output stays the same until the fork layers are trained.

    Args:
        config: Config of a decoder without fork layers.
        params: Parameters of the decoder, a nested dict of arrays, such as `load_pretrained`
            returns, or an `nnx.State`; the arrays are neither copied nor changed.
        layers: Indices of the blocks that get a fork layer in front, from 0, in increasing order.
        policy: Policy of the fork layers.
        seed: Seed to initialise the new parameters, which are float32 and replicated on the devices
            of the embedding.

    Returns:
        The new config, and the parameters with one more entry, "forks", for the fork layers.

    Raises:
        ValueError: The config has fork layers or copies, `layers` is empty or has an index out of
            range, or the parameters do not belong to the config.
    """
    if config.fork_layers:
        raise ValueError(
            f"the model forks before layers {config.fork_layers} already: take one without forks"
        )
    if not layers:
        raise ValueError(f"layers={layers}: name the blocks to fork before, such as (10, 20)")
    forking = forking_config(config, layers, policy)
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    abstract_module(lambda: Thoughtbubbles.from_params(config, params))  # raises if they don't fit

    def forks() -> Any:
        # XLA computes only the returned arrays, so the other parameters cost nothing.
        model = Thoughtbubbles(forking, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model))["forks"]

    replicated = _replicated_like(params["embed"])
    return forking, {**params, "forks": jax.jit(forks, out_shardings=replicated)()}


def forking_config(config: ModelConfig, layers: Sequence[int], policy: Policy) -> ModelConfig:
    """Return the config with fork layers whose initial parameters leave the output unchanged."""
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
    """Return the sharding that replicates an array on all devices of the given array."""
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
