"""The weaver: learned queries read the stream so far and come out as latent memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memgen.backbone import DecoderBackbone
from memgen.config import WeaverConfig
from memgen.insertion import PROMPT
from memgen.lora import make_adapter

SAMPLED_IDS = 1024
NORM_EPS = 1e-5


class WeaverParam(nnx.Param):
    """What weaver training moves; `inputs` in its metadata says how many axes are contracted."""


class Snippets(NamedTuple):
    """Retrieved text that an event may read besides the stream.

    Attributes:
        vectors: `[B, C, D]` in the reasoner's space.
        length: `[B]` int32, how many are real.
    """

    vectors: jax.Array
    length: jax.Array


class Bank(nnx.Module):
    """Query latents of one kind of event: `scale * LayerNorm(queries)`, `[slots, width]`."""

    def __init__(self, slots: int, width: int, *, rngs: nnx.Rngs):
        self.queries = WeaverParam(jax.random.normal(rngs.params(), (slots, width)), inputs=0)
        self.norm_scale = WeaverParam(jnp.ones((width,)), inputs=0)
        self.norm_bias = WeaverParam(jnp.zeros((width,)), inputs=0)
        self.scale = WeaverParam(jnp.ones(()), inputs=0)

    def __call__(self) -> jax.Array:
        x = self.queries[...]
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + NORM_EPS)
        return self.scale[...] * (x * self.norm_scale[...] + self.norm_bias[...])


class Projection(nnx.Module):
    """A dense map with bias; both begin uniform within `1 / sqrt(inputs)`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        draw = lambda shape: jax.random.uniform(  # noqa: E731
            rngs.params(), shape, minval=-(inputs**-0.5), maxval=inputs**-0.5
        )
        self.kernel = WeaverParam(draw((inputs, outputs)), inputs=1)
        self.bias = WeaverParam(draw((outputs,)), inputs=0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Weaver(nnx.Module):
    """Queries, projections and the adapter that makes a decoder weave.

    It owns no decoder: `backbone` is handed to every call, with the weaver's adapter beside it.

    Args:
        reasoner: whose stream is read and written.
        backbone: the decoder that weaves, the reasoner itself or another one of any width.
        config: sizes.
        rngs: for the initial values.
    """

    def __init__(
        self,
        reasoner: DecoderBackbone,
        backbone: DecoderBackbone,
        config: WeaverConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        width, reads = backbone.embed_dim, config.context != "nothing"
        asks = width if reads else reasoner.embed_dim
        self.adapter = (
            make_adapter(backbone, config.lora, rngs=rngs, kind=WeaverParam)
            if reads
            else nnx.Dict()
        )
        bank = lambda slots: Bank(slots, asks, rngs=rngs) if slots else None  # noqa: E731
        self.prompt = bank(config.prompt_latents)
        self.inference = bank(config.inference_latents)
        self.to_weaver = Projection(reasoner.embed_dim, width, rngs=rngs)
        self.to_reasoner = Projection(width, reasoner.embed_dim, rngs=rngs)
        self.gain = WeaverParam(_embedding_size(reasoner), inputs=0) if config.match_scale else None

    def width(self, kind: jax.Array) -> jax.Array:
        """Latents that an event of each kind writes, int32."""
        return jnp.where(kind == PROMPT, self.config.prompt_latents, self.config.inference_latents)

    def queries(self, kind: jax.Array) -> jax.Array:
        """`[B, K, d_w]` for `kind [B]`; the shorter kind is filled up with zeros."""
        given = [bank() for bank in (self.prompt, self.inference) if bank is not None]
        blank = jnp.zeros((self.config.latents, given[0].shape[-1]))
        banks = [
            blank if bank is None else blank.at[: bank.queries.shape[0]].set(bank())
            for bank in (self.prompt, self.inference)
        ]
        return jnp.where((kind == PROMPT)[:, None, None], *banks)

    def context(self, vectors: jax.Array) -> jax.Array:
        """Rows of the reasoner's stream as the weaver reads them, `[..., d_r]` to `[..., d_w]`."""
        return self.to_weaver(vectors)

    def memory(self, hidden: jax.Array) -> jax.Array:
        """What the weaver's decoder gave at its queries, `[..., d_w]`, as latents `[..., d_r]`."""
        latents = self.to_reasoner(hidden)
        if self.gain is None:
            return latents
        # The mean square itself may be tiny: no epsilon may dominate it.
        size = jnp.sqrt(jnp.square(latents.astype(jnp.float32)).mean(axis=-1, keepdims=True))
        size = jnp.maximum(size, 1e-12)
        return (latents / size * self.gain[...]).astype(latents.dtype)

    def fixed(self, kind: jax.Array) -> jax.Array:
        """Latents that depend on no text, `[..., K, d_r]` for `kind [...]`."""
        queries = self.queries(kind.reshape(-1))
        latents = self.memory(jax.nn.gelu(self.to_weaver(queries)))
        return latents.reshape(*kind.shape, *latents.shape[1:])

    def weave(
        self,
        backbone: DecoderBackbone,
        stream: jax.Array,
        length: jax.Array,
        kind: jax.Array,
        snippets: Snippets | None = None,
    ) -> jax.Array:
        """Latents of one event for each row, `[B, K, d_r]`.

        Args:
            backbone: with the weaver's adapter.
            stream: `[B, S, d_r]`; what stands at or after `length [B]` is not seen.
            kind: `[B]` int32.
            snippets: read between stream and queries.
        """
        suffix, extra = self.suffix(kind, snippets)
        batch, places, width = stream.shape[0], stream.shape[1], suffix.shape[-1]
        pool = jnp.concatenate([self.context(stream), suffix.astype(stream.dtype)], axis=1)
        place = jnp.arange(pool.shape[1])
        index = jnp.where(place < length[:, None], place, places + place - length[:, None])
        x = jnp.take_along_axis(pool, jnp.minimum(index, pool.shape[1] - 1)[..., None], axis=1)
        total = length + extra + self.config.latents
        hidden = backbone.hidden_states(x, total)
        at = (length + extra)[:, None] + jnp.arange(self.config.latents)
        chosen = jnp.take_along_axis(hidden, at[..., None], axis=1)
        return self.memory(chosen.reshape(batch, -1, width))

    def suffix(self, kind: jax.Array, snippets: Snippets | None) -> tuple[jax.Array, jax.Array]:
        """What follows the stream: snippets and then queries `[B, C + K, d_w]`, and how many
        snippet vectors of each row come first, `[B]`."""
        queries = self.queries(kind)
        if snippets is None:
            return queries, jnp.zeros(kind.shape, jnp.int32)
        vectors = self.context(snippets.vectors)
        pool = jnp.concatenate([vectors, queries.astype(vectors.dtype)], axis=1)
        place, slots = jnp.arange(pool.shape[1]), snippets.vectors.shape[1]
        first = snippets.length[:, None]
        index = jnp.where(place < first, place, slots + place - first)
        index = jnp.minimum(index, pool.shape[1] - 1)
        return jnp.take_along_axis(pool, index[..., None], axis=1), snippets.length

    def weave_parallel(
        self, backbone: DecoderBackbone, vectors: jax.Array, point: jax.Array, kind: jax.Array
    ) -> jax.Array:
        """Latents of all events in one pass, `[B, E, K, d_r]`: queries see tokens, no latents.

        Positions count tokens only: the queries of an event before token `s` stand at `s`,
        `s + 1`, and so on.

        Args:
            backbone: with the weaver's adapter.
            vectors: `[B, L, d_r]` embedded tokens.
            point, kind: `[B, E]` int32.
        """
        batch, length, _ = vectors.shape
        events, slots = point.shape[1], self.config.latents
        queries = self.queries(kind.reshape(-1)).reshape(batch, events * slots, -1)
        x = self.context(vectors)
        x = jnp.concatenate([x, queries.astype(x.dtype)], axis=1)
        token = jnp.arange(length)
        rank = jnp.tile(jnp.arange(slots), events)
        event = jnp.repeat(jnp.arange(events), slots)
        first = jnp.repeat(jnp.maximum(point, 0), slots, axis=1)
        positions = jnp.concatenate(
            [jnp.broadcast_to(token, (batch, length)), first + rank], axis=1
        )
        tokens_see = jnp.broadcast_to(token[:, None] >= token, (batch, length, length))
        none = jnp.zeros((batch, length, events * slots), bool)
        own = (event[:, None] == event) & (rank[:, None] >= rank)
        visible = jnp.block(
            [
                [tokens_see, none],
                [token < first[..., None], jnp.broadcast_to(own, (batch, *own.shape))],
            ]
        )
        hidden = backbone.hidden_states(x, positions=positions, visible=visible)[:, length:]
        return self.memory(hidden).reshape(batch, events, slots, -1)


def _embedding_size(reasoner: DecoderBackbone) -> jax.Array:
    """Root mean square of the entries of token embeddings, over ids spread evenly."""
    count = min(reasoner.vocab_size, SAMPLED_IDS)
    ids = jnp.arange(count) * (reasoner.vocab_size // count)
    return jnp.sqrt(jnp.square(reasoner.embed_tokens(ids).astype(jnp.float32)).mean())
