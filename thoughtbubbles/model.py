"""Thoughtbubbles: the forking decoder with its cache, its backbone and its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from thoughtbubbles import fork_models, statistics
from thoughtbubbles.architecture import ARCHITECTURES
from thoughtbubbles.backbone import Backbone
from thoughtbubbles.cache import Cache, advance, init_cache
from thoughtbubbles.config import ModelConfig
from thoughtbubbles.forward import ForkingDecoder, Output
from thoughtbubbles.placement import AnyArray
from thoughtbubbles.policy import Policy
from thoughtbubbles.streams import Streams


class Thoughtbubbles(ForkingDecoder):
    """A causal decoder whose residual streams fork (arXiv 2510.00219).

    All blocks are stacked along a leading `layers` axis, wherever the fork layers are. So the
    blocks of a plain decoder fit a forking model.

    Args:
        config: Sizes and options of the model.
        rngs: Random keys of the initial values.
        constrain: Function applied to every residual array `[B, S, D]` between blocks; a trainer
            passes the sharding constraint of its mesh.
        attend: Attention of the blocks; a trainer passes the kernel of its devices. The default is
            `thoughtbubbles.attention.attend`.
        kernel_init: Initializer of the kernels of blocks, fork layers and an untied head (`Block`).
        param_dtype: Dtype of the parameters; the computation uses the config's `dtype`.

    Raises:
        ValueError: The config is not a `ModelConfig`, or `param_dtype` is not floating-point.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig

    def hidden_states(
        self,
        x: jax.Array,
        length: AnyArray | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        return Backbone(self).hidden_states(x, length, positions=positions, visible=visible)

    def extend(
        self, cache: Cache, x: jax.Array, length: AnyArray, *, fresh: bool = False
    ) -> tuple[jax.Array, Cache]:
        return Backbone(self).extend(cache, x, length, fresh=fresh)

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]:
        return Backbone(self).lora_targets

    @property
    def lora_axes(self) -> Mapping[str, tuple[tuple[str, ...], str, str]]:
        return Backbone(self).lora_axes

    def apply_lora(self, adapter: Mapping[str, Any]) -> Backbone:
        return Backbone(self).apply_lora(adapter)

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> ForkingDecoder:
        return Backbone(self).merge_lora(deltas)

    def init_cache(self, batch: int, max_tokens: int) -> Cache:
        """Return an empty cache of `batch` rows with room for `max_tokens` tokens each."""
        return init_cache(self, batch, max_tokens)

    def advance(
        self, cache: Cache, tokens: AnyArray, length: AnyArray, *, fresh: bool = False
    ) -> tuple[Streams, Cache]:
        x = self.embed_tokens(tokens)
        return advance(self, self.layers(), cache, x, length, fresh)

    def backbone(self) -> Backbone:
        """Return the model as a decoder over vectors."""
        return Backbone(self)

    @property
    def takes_positions(self) -> bool:
        """Whether `hidden_states` takes `positions` and `visible`: without forks and copies."""
        return not self.config.fork_layers and self.config.copies == 1

    @property
    def fork_policy(self) -> Policy | None:
        """Policy of the fork layers; None for a model without fork layers."""
        return self.config.policy if self.config.fork_layers else None

    @property
    def cacheable(self) -> bool:
        """Whether the policy is causal and has the methods that a cache needs."""
        return fork_models.cacheable(self.config)

    def check_cacheable(self) -> None:
        """Raise a ValueError that names the policy unless the model is `cacheable`."""
        fork_models.check_cacheable(self.config)

    def statistics(self, output: Output) -> dict[str, jax.Array]:
        """Sum fork statistics over the batch, by fork layer (`statistics.fork_statistics`)."""
        return statistics.fork_statistics(output)

    def row_statistics(self, output: Output) -> dict[str, jax.Array]:
        """Return `streams [B]` int32, the number of live streams of each row in the last block."""
        return {"streams": output.streams.alive.sum(axis=1)}

    @classmethod
    def tracked_statistics(cls, tracked: Any) -> dict[str, jax.Array]:
        """Return `threshold [F]` of the `F` fork layers; an empty dict if none is tracked."""
        return statistics.thresholds(tracked)

    @classmethod
    def step_metrics(cls, config: ModelConfig, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Compute metrics of each fork layer from the sums (`statistics.readable`)."""
        return statistics.readable(sums, config.fork_layers)

    @classmethod
    def step_histograms(cls, config: ModelConfig, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Return samples of the scores of all streams, by fork layer, for histograms."""
        return statistics.score_samples(sums, config.fork_layers)


ARCHITECTURES["thoughtbubbles"] = Thoughtbubbles
