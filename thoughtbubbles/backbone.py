"""A `Thoughtbubbles` model, forking or plain, as a decoder over vectors with LoRA adapters.

The backbone maps vectors to hidden states and takes LoRA adapters on its linear layers. These are
the methods that `memgen` needs of any decoder (`memgen.DecoderBackbone`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from thoughtbubbles.attention import attend_where
from thoughtbubbles.branches import attend_branches
from thoughtbubbles.cache import Cache, advance, init_cache, keep_first
from thoughtbubbles.checks import check_adapter, check_deltas, check_vectors, checked_lengths
from thoughtbubbles.forward import ForkingDecoder
from thoughtbubbles.layers import Block, Geometry
from thoughtbubbles.module import Module
from thoughtbubbles.placement import AnyArray
from thoughtbubbles.positions import rotary_angles
from thoughtbubbles.quantisation import Int8Weight
from thoughtbubbles.streams import Streams

ATTENTION_MAPS = ("q", "k", "v", "o")
MLP_MAPS = ("up", "gate", "down")


class Backbone(Module):
    """A `Thoughtbubbles` model over vectors in place of tokens.

    Vectors that are appended to a row take its next positions. Decoding with a cache needs a causal
    policy; `hidden_states` does not.

    Args:
        model: Model whose parameters are used; nothing is copied.

    Raises:
        ValueError: The model forks and has `merge="probability"`, so that a token has no single
            hidden state.
    """

    def __init__(self, model: ForkingDecoder):
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
        """Linear layers that take an adapter, by name: stack shape, inputs and outputs of each."""
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

    @property
    def lora_axes(self) -> dict[str, tuple[tuple[str, ...], str, str]]:
        """Axis names of each layer of `lora_targets`: those of its stack, its inputs, its outputs.

        Inputs or outputs that cover several axes of the weight, such as heads and head width, have
        the name of the first axis, because a mesh splits them along it.
        """
        axes = {"q": "heads", "k": "kv_heads", "v": "kv_heads", "up": "mlp", "gate": "mlp"}
        found = {name: (("layers",), "embed", outputs) for name, outputs in axes.items()}
        found |= {"o": (("layers",), "heads", "embed"), "down": (("layers",), "mlp", "embed")}
        return {name: found[name] for name in self.lora_targets}

    def apply_lora(self, adapter: Mapping[str, Any]) -> Backbone:
        """Return a backbone of the same arrays with adapters added to its linear layers.

        Args:
            adapter: Adapters by names of `lora_targets`. Each is a pytree that can be called, from
                `[..., inputs]` to `[..., outputs]`, and whose arrays begin with the stack axes.

        Raises:
            ValueError: A name is not one of `lora_targets`, the matrices of an adapter do not fit
                its layer, or the model has an adapter already.
        """
        check_adapter(self.lora_targets, adapter)
        leaves, structure = jax.tree.flatten(self.model)
        model: ForkingDecoder = jax.tree.unflatten(structure, leaves)
        for block, index in _blocks_of(model):
            for module, names in ((block.attention, ATTENTION_MAPS), (block.mlp, MLP_MAPS)):
                mine = {name: adapter[name] for name in names if name in adapter}
                if mine and module.adapters is not None:
                    raise ValueError(
                        "this decoder has an adapter already: merge it first (merge_lora)"
                    )
                if index is not None:
                    mine = jax.tree.map(lambda leaf, index=index: leaf[index], mine)
                module.adapters = nnx.data(mine or None)
        return Backbone(model)

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> ForkingDecoder:
        """Return the model with `deltas` added to the weights of its linear layers.

        Args:
            deltas: Changes of weights, `[*stack, inputs, outputs]` each, by names of
                `lora_targets`, such as `LoRAWeights.delta`.

        Raises:
            ValueError: A name is not one of `lora_targets`, a delta has another shape than its
                layer, or the weight is in int8.
        """
        check_deltas(self.lora_targets, deltas)
        leaves, structure = jax.tree.flatten(self.model)
        model: ForkingDecoder = jax.tree.unflatten(structure, leaves)
        for block, index in _blocks_of(model):
            for name, delta in deltas.items():
                kernel = getattr(block.attention if name in ATTENTION_MAPS else block.mlp, name)
                if isinstance(kernel, Int8Weight):
                    raise ValueError(f"{name} is in int8: merge adapters first, then quantise")
                delta = delta if index is None else delta[index]
                delta = delta.reshape(kernel.shape).astype(kernel.dtype)
                # Not kernel[...] = ...: that writes into NumPy arrays, which the other model
                # shares.
                kernel.set_value(kernel[...] + delta)
        return model

    def for_decoding(self) -> Backbone:
        """Return the backbone with unstacked blocks, so that a loop over `extend` copies none."""
        if self.model.unstacked is not None:
            return self
        return Backbone(self.model.for_decoding())

    def embed_tokens(self, tokens: AnyArray) -> jax.Array:
        """Vectors `[..., D]` of token ids `[...]`; NaN for an id outside the vocabulary."""
        return self.model.embed_tokens(tokens)

    def hidden_states(
        self,
        x: jax.Array,
        length: AnyArray | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states `[B, T, D]` after the final norm.

        Args:
            x: Vectors `[B, T, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; all `T` by default.
            positions: Position of each vector, `[B, T]` int32, given together with `visible` in
                place of `length`, for rows that are not one text from left to right.
            visible: Whether a vector (axis 1) attends to another (axis 2), `[B, T, T]` bool.

        Raises:
            ValueError: The vectors are not `[B, T, D]`, a length is not from 0 to `T`, only one of
                `positions` and `visible` is given, or both are given to a model with fork layers or
                copies.
        """
        check_vectors(x, self.embed_dim, "a decoder")
        x = x.astype(self.model.config.dtype)
        if positions is None and visible is None:
            return self._hidden(self.model.run_residuals(x, length).streams)
        if positions is None or visible is None:
            raise ValueError("positions and visible belong together: give both or neither")
        return self._read_where(x, positions, visible)

    def branch_states(self, prefix: jax.Array, length: jax.Array, x: jax.Array) -> jax.Array:
        """Hidden states of several continuations of each row, which share one pass over its prefix.

        Up to rounding, values and gradients are those of `hidden_states` on rows of a prefix and
        one continuation behind it.

        Args:
            prefix: Vectors `[B, P, D]` of the beginnings of rows, padded on the right; `P` is 1 or
                more.
            length: Number of real vectors of each prefix, `[B]` int32.
            x: Vectors `[B, N, C, D]` of `N` continuations of each row, padded on the right.

        Returns:
            Hidden states `[B, N, C, D]` of the continuations, after the final norm.

        Raises:
            ValueError: The model has fork layers or copies, `P` is 0, or lengths are not integers,
                one for each row.
        """
        rows, count, size, width = x.shape
        shared = prefix.shape[1]
        if not shared:
            raise ValueError("prefixes of 0 vectors: give hidden_states the continuations alone")
        length = checked_lengths(length, prefix)
        own = jnp.concatenate([length[:, None] + jnp.arange(size)] * count, axis=1)
        before = jnp.zeros_like(length)[:, None] + jnp.arange(shared)
        positions = jnp.concatenate([before, own], axis=1)
        packed = jnp.concatenate([prefix, x.reshape(rows, count * size, width)], axis=1)
        mix = lambda q, k, v: (attend_branches(q, k, v, length, (count, size)), None)  # noqa: E731
        hidden = self._read_by(mix, packed.astype(self.model.config.dtype), positions)
        return hidden[:, shared:].reshape(x.shape)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[..., D]` to logits `[..., V]` float32."""
        return self.model.unembed(hidden)

    def init_cache(self, batch: int, max_len: int) -> Cache:
        """Return an empty cache for `batch` rows of up to `max_len` vectors.

        Raises:
            ValueError: The model's policy is not causal or has no methods for a cache
                (`CausalPolicy`), or a size is below 1.
        """
        return init_cache(self.model, batch, max_len)

    def extend(
        self, cache: Cache, x: jax.Array, length: AnyArray, *, fresh: bool = False
    ) -> tuple[jax.Array, Cache]:
        """Append vectors to the rows of a cache and return their hidden states.

        Any split of a row into calls gives the hidden states of one call of `hidden_states`.

        Args:
            cache: Cache that `init_cache` or `extend` returned.
            x: Vectors `[B, C, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; 0 leaves a row as it is.
            fresh: Static promise that the cache is empty.

        Returns:
            Hidden states `[B, C, D]`, NaN for a row that outgrows the cache, and the new cache.

        Raises:
            ValueError: The vectors are not `[B, C, D]`, the lengths are not integers, one for each
                row, or the cache was made for another config or number of rows.
        """
        check_vectors(x, self.embed_dim, "a decoder")
        x = x.astype(self.model.config.dtype)
        streams, cache = advance(self.model, self.model.layers(), cache, x, length, fresh)
        return self._hidden(streams), cache

    @property
    def can_forget(self) -> bool:
        """Whether `extend_keeping` can be used: only without fork layers, which keep all tokens."""
        return not self.model.config.fork_layers

    def extend_keeping(
        self, cache: Cache, x: jax.Array, length: AnyArray, kept: AnyArray
    ) -> tuple[jax.Array, Cache]:
        """Append vectors to the rows of a cache, and keep only the first of them in the new cache.

        One call can thus read text and, behind it, vectors that the cache must not hold, such as a
        weaver's queries.

        Args:
            cache: Cache that `init_cache` or `extend` returned.
            x: Vectors `[B, C, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32.
            kept: Number of leading vectors of `x` that stay in the cache, `[B]` int32.

        Returns:
            Hidden states `[B, C, D]` of all vectors, and the new cache.

        Raises:
            ValueError: The model has fork layers, or `extend` would raise one.
        """
        if not self.can_forget:
            raise ValueError(
                f"fork layers {self.model.config.fork_layers} forget no token: extend by what "
                "stays, then by the rest"
            )
        hidden, after = self.extend(cache, x, length)
        return hidden, keep_first(cache, after, jnp.asarray(kept))

    def _hidden(self, streams: Streams) -> jax.Array:
        return self.model.final_norm(self.model.merged(streams))

    def _read_where(self, x, positions, visible):
        mix = lambda query, key, value: (attend_where(query, key, value, visible), None)  # noqa: E731
        return self._read_by(mix, x, positions)

    def _read_by(self, mix, x, positions):
        """Hidden states of vectors at given positions, with the attention `mix`."""
        config = self.model.config
        if config.fork_layers or config.copies > 1:
            raise ValueError(
                "rows that are not one text from left to right can't fork: use a model without "
                f"fork layers (now {config.fork_layers}) or copies (now {config.copies})"
            )
        angles = rotary_angles(positions, config.head_width, config.rope_base, config.rope_scaling)
        streams = self.model.run_blocks(
            Streams.start(x), 0, config.num_layers, Geometry(*angles), mix
        )
        return self._hidden(streams)


def _blocks_of(model: ForkingDecoder) -> list[tuple[Block, int | None]]:
    """Modules that hold the blocks' weights: the stack and None, or each block and its index."""
    if model.unstacked is not None:
        return [(block, layer) for layer, block in enumerate(model.unstacked)]
    assert model.blocks is not None  # one of the two forms
    return [(model.blocks, None)]
