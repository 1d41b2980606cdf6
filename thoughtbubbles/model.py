"""The `Thoughtbubbles` model: a forking decoder with cache, LoRA backbone and statistics."""

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
from thoughtbubbles.rows import real_ids
from thoughtbubbles.streams import Streams


class Thoughtbubbles(ForkingDecoder):
    """A causal decoder whose residual streams fork (arXiv 2510.00219).

    The parameters of all blocks are stacked along a leading `layers` axis, whatever the positions
    of the fork layers, so a forking model can load the blocks of a plain decoder.

    Args:
        config: Sizes and options of the model.
        rngs: PRNG keys to initialise the parameters.
        constrain: Function applied to every residual array `[B, S, D]` between blocks; a trainer
            passes the sharding constraint of its mesh.
        attend: Attention function of the blocks, such as a kernel for the trainer's devices. The
            default is `thoughtbubbles.attention.attend`.
        kernel_init: Initializer of the kernels of blocks, fork layers and an untied LM head; see
            `Block`.
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
        """Return an empty cache of `batch` rows with a capacity of `max_tokens` tokens each."""
        return init_cache(self, batch, max_tokens)

    def advance(
        self, cache: Cache, tokens: AnyArray, length: AnyArray, *, fresh: bool = False
    ) -> tuple[Streams, Cache]:
        x = self.embed_tokens(real_ids(tokens, length))
        return advance(self, self.layers(), cache, x, length, fresh)

    def backbone(self) -> Backbone:
        """Return the model as a decoder from vectors to hidden states, with LoRA support."""
        return Backbone(self)

    @property
    def takes_positions(self) -> bool:
        """Whether `hidden_states` supports `positions` and `visible` (no fork layers or copies)."""
        return not self.config.fork_layers and self.config.copies == 1

    @property
    def fork_policy(self) -> Policy | None:
        """Policy of the fork layers; None for a model without fork layers."""
        return self.config.policy if self.config.fork_layers else None

    @property
    def cacheable(self) -> bool:
        """Whether the model can decode with a cache: its policy is causal and a `CausalPolicy`."""
        return fork_models.cacheable(self.config)

    def check_cacheable(self) -> None:
        """Raise a ValueError that names the policy unless the model is `cacheable`."""
        fork_models.check_cacheable(self.config)

    def statistics(self, output: Output) -> dict[str, jax.Array]:
        """Count the batch's tokens and streams after each fork layer (`fork_statistics`)."""
        return statistics.fork_statistics(output)

    def row_statistics(self, output: Output) -> dict[str, jax.Array]:
        """Return `streams [B]` int32, the number of live streams in each row in the last block."""
        return {"streams": output.streams.alive.sum(axis=1)}

    @classmethod
    def tracked_statistics(cls, tracked: Any) -> dict[str, jax.Array]:
        """Return `threshold [F]`, tracked in `F` fork layers; an empty dict if none is tracked."""
        return statistics.thresholds(tracked)

    @classmethod
    def step_metrics(cls, config: ModelConfig, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Compute metrics of each fork layer from summed statistics (`statistics.readable`)."""
        return statistics.readable(sums, config.fork_layers)

    @classmethod
    def step_histograms(cls, config: ModelConfig, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scores of all streams for a histogram of each fork layer."""
        return statistics.score_samples(sums, config.fork_layers)


ARCHITECTURES["thoughtbubbles"] = Thoughtbubbles
