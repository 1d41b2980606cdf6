"""A decoder over vectors: what others build on a `Thoughtbubbles` model, forking or plain.

Rows of vectors come in, hidden states come out; adapters stand beside the weights. `memgen` asks
for exactly this of any decoder (`memgen.DecoderBackbone`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from thoughtbubbles.attention import attend_where
from thoughtbubbles.cache import Cache, advance, init_cache
from thoughtbubbles.layers import Geometry
from thoughtbubbles.positions import rotary_angles
from thoughtbubbles.streams import Streams

if TYPE_CHECKING:
    from thoughtbubbles.model import Thoughtbubbles

ATTENTION_MAPS = ("q", "k", "v", "o")
MLP_MAPS = ("up", "gate", "down")


class Backbone(nnx.Module):
    """A `Thoughtbubbles` model that reads vectors.

    Rows have no holes: what is appended to a row takes its next positions. A cache needs a causal
    policy; `read` does not.

    Args:
        model: whose parameters these are; nothing is copied.

    Raises:
        ValueError: a token of the model has no one hidden state (`merge="probability"`).
    """

    def __init__(self, model: Thoughtbubbles):
        if model.config.merge == "probability" and model.config.fork_layers:
            raise ValueError(
                "merge='probability' mixes predictions, a token has no one hidden state: "
                "use a model with merge='residual' or 'rightmost'"
            )
        self.model = model

    @property
    def embed_dim(self) -> int:
        return self.model.config.embed_dim

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def lora_targets(self) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Maps that an adapter can stand beside: stacked axes, inputs and outputs of each."""
        config = self.model.config
        heads, kv_heads = (n * config.head_width for n in (config.num_heads, config.kv_heads))
        embed, wide = config.embed_dim, config.mlp_width
        sizes = {
            "q": (embed, heads),
            "k": (embed, kv_heads),
            "v": (embed, kv_heads),
            "o": (heads, embed),
            "up": (embed, wide),
            "down": (wide, embed),
        }
        if config.mlp == "swiglu":
            sizes["gate"] = (embed, wide)
        return {name: ((config.num_layers,), *size) for name, size in sizes.items()}

    def apply_lora(self, adapter: Mapping[str, Any]) -> Backbone:
        """The same arrays with an adapter beside them.

        Args:
            adapter: by names of `lora_targets`; pytrees that one calls, `[..., in]` to
                `[..., out]`, whose arrays begin with the stacked axes.

        Raises:
            ValueError: a name that the model has no map for, or it has an adapter already.
        """
        unknown = sorted(set(adapter) - set(self.lora_targets))
        if unknown:
            raise ValueError(
                f"no map {unknown[0]!r} to adapt: choose from {', '.join(self.lora_targets)}"
            )
        leaves, structure = jax.tree.flatten(self.model)
        model: Thoughtbubbles = jax.tree.unflatten(structure, leaves)
        for module, names in (
            (model.blocks.attention, ATTENTION_MAPS),
            (model.blocks.mlp, MLP_MAPS),
        ):
            mine = {name: adapter[name] for name in names if name in adapter}
            if mine and module.adapters is not None:
                raise ValueError("this decoder has an adapter already: merge it first (merged)")
            module.adapters = nnx.data(mine or None)
        return Backbone(model)

    def merged(self, deltas: Mapping[str, jax.Array]) -> Thoughtbubbles:
        """A model whose maps have taken up `deltas`, `[*stack, inputs, outputs]` each by name."""
        leaves, structure = jax.tree.flatten(self.model)
        model: Thoughtbubbles = jax.tree.unflatten(structure, leaves)
        for name, delta in deltas.items():
            module = model.blocks.attention if name in ATTENTION_MAPS else model.blocks.mlp
            kernel = getattr(module, name)
            kernel[...] = kernel[...] + delta.reshape(kernel.shape).astype(kernel.dtype)
        return model

    def for_decoding(self) -> Backbone:
        """The form for a loop over `extend`: no step copies weights out of their stack."""
        return Backbone(self.model.for_decoding())

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """`[..., D]`; NaN for an id outside the vocabulary."""
        return self.model.embed_tokens(tokens)

    def hidden_states(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states `[B, T, D]` after the final norm.

        Args:
            x: `[B, T, D]` vectors, padded on the right.
            length: `[B]` int32 of them real; all if not given.
            positions: `[B, T]` int32, and
            visible: `[B, T, T]` bool, which places each place sees: together, in place of
                `length`, for rows that are not one text from left to right.

        Raises:
            ValueError: only one of `positions` and `visible`, or a forking model is given them.
        """
        x = x.astype(self.model.config.dtype)
        if positions is None and visible is None:
            return self._hidden(self.model.run_residuals(x, length).streams)
        if positions is None or visible is None:
            raise ValueError("positions and visible belong together: give both or neither")
        return self._read_where(x, positions, visible)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[..., D]` to logits `[..., V]` float32."""
        return self.model.unembed(hidden)

    def init_cache(self, batch: int, max_len: int) -> Cache:
        """Room for `max_len` vectors in each row.

        Raises:
            ValueError: the model's policy is not causal, or a size is below 1.
        """
        return init_cache(self.model, batch, max_len)

    def extend(
        self, cache: Cache, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Cache]:
        """Append to each row of the cache; any split into calls gives what `read` gives.

        Args:
            x: `[B, C, D]` vectors, padded on the right.
            length: `[B]` int32 of them real; rows of length 0 stay as they are.
            fresh: static promise that the cache is empty.

        Returns:
            hidden states `[B, C, D]` (NaN for a row that outgrows the cache), and the cache.
        """
        x = x.astype(self.model.config.dtype)
        streams, cache = advance(self.model, self.model.layers(), cache, x, length, fresh)
        return self._hidden(streams), cache

    def _hidden(self, streams: Streams) -> jax.Array:
        return self.model.final_norm(self.model.merged(streams))

    def _read_where(self, x, positions, visible):
        config = self.model.config
        if config.fork_layers or config.copies > 1:
            raise ValueError(
                "rows that are not one text from left to right can't fork: use a model without "
                f"fork layers (now {config.fork_layers}) or copies (now {config.copies})"
            )
        angles = rotary_angles(
            positions.astype(jnp.float32), config.head_width, config.rope_base, config.rope_scaling
        )
        mix = lambda query, key, value: (attend_where(query, key, value, visible), None)  # noqa: E731
        streams = self.model.run_blocks(
            Streams.start(x), 0, config.num_layers, Geometry(*angles), mix
        )
        return self._hidden(streams)
