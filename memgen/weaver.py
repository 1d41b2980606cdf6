"""The weaver: learned queries attend to the reasoner's context and become latent memory."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from memgen.backbone import DecoderBackbone
from memgen.checks import check_config, check_floating, check_rngs, check_width
from memgen.config import WeaverConfig
from memgen.insertion import PROMPT
from memgen.lora import make_adapter
from memgen.module import Module, checked_kernel, named
from memgen.placement import broadcast_beside, embed, placed_beside, product, repeat_beside
from memgen.short_repr import short_repr

SAMPLED_IDS = 1024
NORM_EPS = 1e-5


class WeaverParam(nnx.Param):
    """Parameter of the weaver; its metadata `inputs` is the number of axes a product contracts."""


class Snippets(NamedTuple):
    """Retrieved text, to which the weaver's queries attend in addition to the reasoner's context.

    Attributes:
        vectors: `[B, C, D]` the reasoner's embeddings of up to `C` retrieved tokens, padded on the
            right.
        length: `[B]` int32, number of real vectors in each row.
    """

    vectors: jax.Array
    length: jax.Array

    __repr__ = short_repr


class Bank(Module):
    """Learned queries of one kind of event; a call returns `scale * LayerNorm(queries)`.

    Args:
        slots: Number of queries, one for each latent of an event.
        width: Width of the queries.
        rngs: PRNG keys that initialise the queries.
        param_dtype: Dtype of the parameters.
    """

    def __init__(self, slots: int, width: int, *, rngs: nnx.Rngs, param_dtype: Dtype = jnp.float32):
        queries = jax.random.normal(rngs.params(), (slots, width)).astype(param_dtype)
        self.queries = named(WeaverParam, queries, (None, "embed"))
        self.norm_scale = named(WeaverParam, jnp.ones((width,), param_dtype), ("embed",))
        self.norm_bias = named(WeaverParam, jnp.zeros((width,), param_dtype), ("embed",))
        self.scale = named(WeaverParam, jnp.ones((), param_dtype), ())

    def __call__(self) -> jax.Array:
        x, scale = self.queries[...].astype(jnp.float32), self.scale[...].astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + NORM_EPS)
        return scale * (x * self.norm_scale[...] + self.norm_bias[...])


class Projection(Module):
    """Linear layer whose kernel and bias are initialised uniformly in `± 1 / sqrt(inputs)`.

    Args:
        inputs: Number of inputs.
        outputs: Number of outputs.
        rngs: PRNG keys that initialise kernel and bias.
        kernel_init: Initializer of the kernel; by default the uniform distribution.
        param_dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
            bound = inputs**-0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound).astype(dtype)

        make = kernel_init or uniform
        kernel = checked_kernel(make, rngs.params(), (inputs, outputs), param_dtype)
        self.kernel = named(WeaverParam, kernel, ("embed", None), inputs=1)
        bias = uniform(rngs.params(), (outputs,), param_dtype)
        self.bias = named(WeaverParam, bias, (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return product(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class Weaver(Module):
    """Learned queries, projections and LoRA adapter that let a decoder write latents.

    The weaver (arXiv 2509.24704) writes the up to `K` latents of an event. The weaver holds no
    decoder: its methods take a decoder to which the weaver's adapter is applied. Computation is in
    the dtype of the input vectors, but the norm of queries and the scale of latents are computed in
    float32.

    Args:
        reasoner: Decoder into whose input sequence latents are inserted, of width `d_r`.
        backbone: Decoder that computes latents, of width `d_w`; the reasoner or another decoder.
        config: Sizes and options of the weaver.
        rngs: PRNG keys that initialise the weaver's parameters.
        kernel_init: Initializer of the projections' kernels; by default uniform in
            `± 1 / sqrt(inputs)`.
        param_dtype: Dtype of the parameters. The adapter is float32.

    Raises:
        ValueError: A target of the adapter selects no linear layer of the backbone, or an argument
            has a wrong type.
    """

    def __init__(
        self,
        reasoner: DecoderBackbone,
        backbone: DecoderBackbone,
        config: WeaverConfig,
        *,
        rngs: nnx.Rngs,
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        check_config(config, WeaverConfig)
        check_floating("param_dtype", param_dtype)
        check_rngs(rngs)
        self.config = config
        width, has_context = backbone.embed_dim, config.context != "nothing"
        query_width = width if has_context else reasoner.embed_dim
        self.adapter = (
            make_adapter(backbone, config.lora, rngs=rngs, kind=WeaverParam)
            if has_context
            else nnx.Dict()
        )
        bank = partial(Bank, width=query_width, rngs=rngs, param_dtype=param_dtype)
        self.prompt = bank(config.prompt_latents) if config.prompt_latents else None
        self.inference = bank(config.inference_latents) if config.inference_latents else None
        projection = partial(
            Projection, rngs=rngs, kernel_init=kernel_init, param_dtype=param_dtype
        )
        self.to_weaver = projection(reasoner.embed_dim, width)
        self.to_reasoner = projection(width, reasoner.embed_dim)
        size = _embedding_size(reasoner).astype(param_dtype) if config.match_scale else None
        self.gain = None if size is None else named(WeaverParam, size, ())

    def width(self, kind: jax.Array) -> jax.Array:
        """Return the number of latents of events of `kind [...]`, int32 of the same shape."""
        return jnp.where(kind == PROMPT, self.config.prompt_latents, self.config.inference_latents)

    def queries(self, kind: jax.Array) -> jax.Array:
        """Return the normalised queries of events, one for each latent slot.

        Args:
            kind: `[...]` int32, kind of each event, `PROMPT` or `INFERENCE`.

        Returns:
            Queries `[..., K, d_w]` in `K` latent slots (`WeaverConfig.latents`), of the width `d_w`
            of the weaver's decoder, or of the reasoner's width with `context="nothing"`. Slots that
            the kind of event does not use are zeros.
        """
        given = [bank() for bank in (self.prompt, self.inference) if bank is not None]
        blank = jnp.zeros((self.config.latents, given[0].shape[-1]))
        banks = [
            blank if bank is None else blank.at[: bank.queries.shape[0]].set(bank())
            for bank in (self.prompt, self.inference)
        ]
        prompt, inference = (repeat_beside(bank, kind) for bank in banks)
        return jnp.where((kind == PROMPT)[..., None, None], prompt, inference)

    def context(self, vectors: jax.Array) -> jax.Array:
        """Project vectors of the reasoner's width `[..., d_r]` to the weaver's width `[..., d_w]`.

        Raises:
            ValueError: The width of the vectors is not `d_r`.
        """
        check_width(vectors, self.to_weaver.kernel.shape[0], "a weaver")
        return self.to_weaver(vectors)

    def memory(self, hidden: jax.Array) -> jax.Array:
        """Project hidden states of the weaver's width `[..., d_w]` to latents `[..., d_r]`.

        Latents have the reasoner's width `d_r`.
        """
        latents = self.to_reasoner(hidden)
        if self.gain is None:
            return latents
        # The root is bounded below, because an epsilon inside could dominate a tiny mean square.
        size = jnp.sqrt(jnp.square(latents.astype(jnp.float32)).mean(axis=-1, keepdims=True))
        size = jnp.maximum(size, 1e-12)
        return (latents / size * self.gain[...]).astype(latents.dtype)

    def fixed(self, kind: jax.Array) -> jax.Array:
        """Return the latents of events with `context="nothing"`, which are the same for every text.

        Args:
            kind: `[...]` int32, kind of each event, `PROMPT` or `INFERENCE`.

        Returns:
            Latents `[..., K, d_r]` in `K` latent slots, of the reasoner's width `d_r`.
        """
        return self.memory(jax.nn.gelu(self.to_weaver(self.queries(kind))))

    def weave(
        self,
        backbone: DecoderBackbone,
        context: jax.Array,
        length: jax.Array,
        kind: jax.Array,
        snippets: Snippets | None = None,
    ) -> jax.Array:
        """Write the latents of one event in each row, by one forward pass of the weaver's decoder.

        Args:
            backbone: Decoder with the weaver's adapter.
            context: `[B, S, d_r]` context before the event: up to `S` input vectors or hidden
                states of the reasoner, of width `d_r`, padded on the right.
            length: `[B]` int32, number of real context vectors in each row.
            kind: `[B]` int32, kind of each row's event, `PROMPT` or `INFERENCE`.
            snippets: Retrieved text, placed between the context and the queries, or None.

        Returns:
            Latents `[B, K, d_r]` in `K` latent slots; arbitrary in slots that the kind of event
            does not use.
        """
        suffix, extra = self.suffix(kind, snippets)
        batch, capacity, width = context.shape[0], context.shape[1], suffix.shape[-1]
        pool = jnp.concatenate([self.context(context), suffix.astype(context.dtype)], axis=1)
        at = jnp.arange(pool.shape[1])
        index = jnp.where(at < length[:, None], at, capacity + at - length[:, None])
        x = jnp.take_along_axis(pool, jnp.minimum(index, pool.shape[1] - 1)[..., None], axis=1)
        total = length + extra + self.config.latents
        hidden = backbone.hidden_states(x, total)
        query = (length + extra)[:, None] + jnp.arange(self.config.latents)
        chosen = jnp.take_along_axis(hidden, query[..., None], axis=1)
        return self.memory(chosen.reshape(batch, -1, width))

    def suffix(self, kind: jax.Array, snippets: Snippets | None) -> tuple[jax.Array, jax.Array]:
        """Make the vectors that follow the context in the weaver's input: snippets and queries.

        In each row, the real snippet vectors come first, then the `K` queries, then padding. So the
        number of valid vectors per row is its number of snippet vectors plus `K`.

        Args:
            kind: `[B]` int32, kind of each row's event, `PROMPT` or `INFERENCE`.
            snippets: Retrieved text of up to `C` tokens, or None.

        Returns:
            Vectors `[B, C + K, d_w]`, with `K` latent slots (`WeaverConfig.latents`), the width
            `d_w` of the weaver's decoder, and `C = 0` without snippets; and the number of snippet
            vectors of each row, `[B]` int32.
        """
        queries = self.queries(kind)
        if snippets is None:
            return queries, jnp.zeros_like(kind)
        vectors = self.context(snippets.vectors)
        pool = jnp.concatenate([vectors, queries.astype(vectors.dtype)], axis=1)
        at, slots = jnp.arange(pool.shape[1]), snippets.vectors.shape[1]
        first = snippets.length[:, None]
        index = jnp.where(at < first, at, slots + at - first)
        index = jnp.minimum(index, pool.shape[1] - 1)
        return jnp.take_along_axis(pool, index[..., None], axis=1), snippets.length

    def weave_parallel(
        self, backbone: DecoderBackbone, vectors: jax.Array, point: jax.Array, kind: jax.Array
    ) -> jax.Array:
        """Write the latents of all events in one forward pass, for `latents_see_latents=False`.

        The queries of an event attend to the tokens before the event and to the event's earlier
        queries, but not to other events. Positions count tokens only: the queries of an event
        before token `s` have the positions `s`, `s + 1`, and so on.

        Args:
            backbone: Decoder with the weaver's adapter.
            vectors: `[B, L, d_r]` embeddings of `L` tokens, of the reasoner's width `d_r`.
            point: `[B, E]` int32, index of the token after each event; -1 for an unused event.
            kind: `[B, E]` int32, kind of each of the `E` events, `PROMPT` or `INFERENCE`.

        Returns:
            Latents `[B, E, K, d_r]` in `K` latent slots; arbitrary in unused events and slots.
        """
        batch, length, _ = vectors.shape
        events, slots = point.shape[1], self.config.latents
        queries = self.queries(kind).reshape(batch, events * slots, -1)
        x = self.context(vectors)
        x = jnp.concatenate([x, queries.astype(x.dtype)], axis=1)
        token = jnp.arange(length)
        rank = jnp.tile(jnp.arange(slots), events)
        event = jnp.repeat(jnp.arange(events), slots)
        first = jnp.repeat(jnp.maximum(point, 0), slots, axis=1)
        positions = jnp.concatenate(
            [broadcast_beside(token, x[:, :length], 2), first + rank], axis=1
        )
        tokens_see = jnp.broadcast_to(token[:, None] >= token, (batch, length, length))
        none = jnp.zeros((batch, length, events * slots), bool)
        own = (event[:, None] == event) & (rank[:, None] >= rank)
        own = jnp.broadcast_to(own, (batch, *own.shape))
        tokens_see, none, own = placed_beside((tokens_see, none, own), x)
        visible = jnp.block(
            [
                [tokens_see, none],
                [token < first[..., None], own],
            ]
        )
        hidden = backbone.hidden_states(x, positions=positions, visible=visible)[:, length:]
        return self.memory(hidden).reshape(batch, events, slots, -1)


def _embedding_size(reasoner: DecoderBackbone) -> jax.Array:
    """Return the root mean square of the embeddings of `SAMPLED_IDS` evenly spaced token ids."""
    count = min(reasoner.vocab_size, SAMPLED_IDS)
    ids = jnp.arange(count) * (reasoner.vocab_size // count)
    return jnp.sqrt(jnp.square(embed(reasoner, ids).astype(jnp.float32)).mean())
