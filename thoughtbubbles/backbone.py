"""Wrapper that presents a `Thoughtbubbles` model as a decoder over vectors with LoRA adapters.

The backbone maps input vectors to hidden states, with or without a cache, and takes LoRA adapters
on its linear layers. It implements the interface that `memgen` expects of any decoder
(`memgen.DecoderBackbone`).
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
    """Decoder over input vectors in place of token ids, with a `Thoughtbubbles` model's parameters.

    Vectors that are appended to a row take the row's next positions. Decoding with a cache requires
    a causal fork policy; `hidden_states` does not.

    Args:
        model: Model, with or without fork layers; its parameters are shared, not copied.

    Raises:
        ValueError: The model has fork layers and `merge="probability"`, so that a token has no
            single hidden state.
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
        """Mapping from a linear layer that takes an adapter to (stack shape, inputs, outputs)."""
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
        """Mapping from each layer in `lora_targets` to logical axes: (stack axes, input, output).

        If the inputs or outputs of a layer span several axes of its kernel, such as heads and head
        width, the name is that of the first axis, along which a mesh shards the kernel.
        """
        axes = {"q": "heads", "k": "kv_heads", "v": "kv_heads", "up": "mlp", "gate": "mlp"}
        found = {name: (("layers",), "embed", outputs) for name, outputs in axes.items()}
        found |= {"o": (("layers",), "heads", "embed"), "down": (("layers",), "mlp", "embed")}
        return {name: found[name] for name in self.lora_targets}

    def apply_lora(self, adapter: Mapping[str, Any]) -> Backbone:
        """Return a backbone that shares this backbone's arrays, with adapters on its linear layers.

        Args:
            adapter: Mapping from a name in `lora_targets` to an adapter: a pytree that is callable,
                from `[..., inputs]` to `[..., outputs]`, with arrays that begin with the stack
                axes.

        Raises:
            ValueError: A name is not in `lora_targets`, an adapter's matrices do not fit its layer,
                or the attention or MLP that the layer belongs to already has an adapter.
        """
        check_adapter(self.lora_targets, adapter)
        leaves, structure = jax.tree.flatten(self.model)
        model: ForkingDecoder = jax.tree.unflatten(structure, leaves)
        for block, index in _blocks_of(model):
            for module, names in ((block.attention, ATTENTION_MAPS), (block.mlp, MLP_MAPS)):
                mine = {name: adapter[name] for name in names if name in adapter}
                if not mine:
                    continue  # an adapter that the module already has stays
                if module.adapters is not None:
                    raise ValueError(
                        "this decoder has an adapter already: merge it first (merge_lora)"
                    )
                if index is not None:
                    mine = jax.tree.map(lambda leaf, index=index: leaf[index], mine)
                module.adapters = nnx.data(mine)
        return Backbone(model)

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> ForkingDecoder:
        """Return the model with `deltas` added to the kernels of its linear layers.

        Args:
            deltas: Mapping from a name in `lora_targets` to the change of the layer's kernel,
                `[*stack, inputs, outputs]`, such as `LoRAWeights.delta`.

        Raises:
            ValueError: A name is not in `lora_targets`, a delta does not have the shape of its
                layer, or the kernel is int8-quantised.
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
                # Not kernel[...] = ...: that writes into NumPy arrays, which the original model
                # shares.
                kernel.set_value(kernel[...] + delta)
        return model

    def for_decoding(self) -> Backbone:
        """Return the backbone with unstacked blocks, so that a loop over `extend` copies none."""
        if self.model.unstacked is not None:
            return self
        return Backbone(self.model.for_decoding())

    def embed_tokens(self, tokens: AnyArray) -> jax.Array:
        """Embed token ids `[...]` as vectors `[..., D]`; NaN for an id outside the vocabulary."""
        return self.model.embed_tokens(tokens)

    def hidden_states(
        self,
        x: jax.Array,
        length: AnyArray | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Compute hidden states `[B, T, D]` of a forward pass over vectors, after the final norm.

        Args:
            x: Vectors `[B, T, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; all `T` by default.
            positions: Position of each vector, `[B, T]` int32, passed together with `visible` in
                place of `length`, for rows that are not a single left-to-right sequence.
            visible: Attention mask of queries (axis 1) and keys (axis 2), `[B, T, T]` bool.

        Raises:
            ValueError: The vectors are not `[B, T, D]`, a length is not from 0 to `T`, only one of
                `positions` and `visible` is given, or the model has fork layers or copies and
                `positions` and `visible` are given.
        """
        check_vectors(x, self.embed_dim, "a decoder")
        x = x.astype(self.model.config.dtype)
        if positions is None and visible is None:
            return self._hidden(self.model.run_residuals(x, length).streams)
        if positions is None or visible is None:
            raise ValueError("positions and visible belong together: give both or neither")
        return self._read_where(x, positions, visible)

    def branch_states(self, prefix: jax.Array, length: jax.Array, x: jax.Array) -> jax.Array:
        """Compute hidden states of several continuations of each prefix in one forward pass.

        The pass processes each prefix once. Up to rounding, values and gradients are the same as
        from `hidden_states` on rows that consist of a prefix and one continuation.

        Args:
            prefix: Vectors `[B, P, D]` of the `P` >= 1 prefix positions, padded on the right.
            length: Number of real vectors in each prefix, `[B]` int32.
            x: Vectors `[B, N, C, D]` of `N` continuations of each prefix with `C` positions each,
                padded on the right.

        Returns:
            Hidden states `[B, N, C, D]` of the continuations, after the final norm.

        Raises:
            ValueError: The model has fork layers or copies, `P` is 0, or `length` is not one
                integer per row.
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
        """Compute logits `[..., V]` float32 from hidden states `[..., D]`."""
        return self.model.unembed(hidden)

    def init_cache(self, batch: int, max_len: int) -> Cache:
        """Return an empty cache.

        Args:
            batch: Number of rows (batch elements).
            max_len: Maximum number of input vectors (positions) in a row.

        Raises:
            ValueError: The model's fork policy is not causal or lacks the cache methods of
                `CausalPolicy`, or a size is below 1.
        """
        return init_cache(self.model, batch, max_len)

    def extend(
        self, cache: Cache, x: jax.Array, length: AnyArray, *, fresh: bool = False
    ) -> tuple[jax.Array, Cache]:
        """Append vectors to the rows of a cache and return the hidden states of these vectors.

        Processing a sequence in chunks, however it is split, gives the same hidden states as one
        call of `hidden_states` over the whole sequence.

        Args:
            cache: Cache that `init_cache` or `extend` returned; it is neither modified nor donated.
            x: Next `C` vectors of each row, `[B, C, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; 0 leaves a row unchanged.
            fresh: Whether the cache is known to be empty (static), which allows a faster prefill.

        Returns:
            Hidden states `[B, C, D]`, NaN for a row that outgrows the cache, and the new cache.

        Raises:
            ValueError: The vectors are not `[B, C, D]`, `length` is not one integer per row, or the
                cache was made for another config or number of rows.
        """
        check_vectors(x, self.embed_dim, "a decoder")
        x = x.astype(self.model.config.dtype)
        streams, cache = advance(self.model, self.model.layers(), cache, x, length, fresh)
        return self._hidden(streams), cache

    @property
    def can_forget(self) -> bool:
        """Whether `extend_keeping` is supported: fork layers can't drop tokens from their state."""
        return not self.model.config.fork_layers

    def extend_keeping(
        self, cache: Cache, x: jax.Array, length: AnyArray, kept: AnyArray
    ) -> tuple[jax.Array, Cache]:
        """Append vectors to the rows of a cache, but keep only the first `kept` in the new cache.

        One forward pass can thus process text and, after the text, vectors that must not stay in
        the cache, such as a weaver's queries.

        Args:
            cache: Cache that `init_cache` or `extend` returned; it is neither modified nor donated.
            x: Next `C` vectors of each row, `[B, C, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32.
            kept: Number of leading vectors in each row of `x` that stay in the cache, `[B]` int32.

        Returns:
            Hidden states `[B, C, D]` of all vectors, and the new cache.

        Raises:
            ValueError: The model has fork layers, or `extend` raises a ValueError.
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
        """Compute hidden states of vectors at given positions, with `mix` as the attention."""
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
    """Return the modules with the blocks' parameters: the stack and None, or blocks and indices."""
    if model.unstacked is not None:
        return [(block, layer) for layer, block in enumerate(model.unstacked)]
    assert model.blocks is not None  # one of the two forms
    return [(model.blocks, None)]
