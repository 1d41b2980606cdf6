"""MemGen: a frozen reasoner, a weaver and a trigger (arXiv 2509.24704)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memgen.backbone import DecoderBackbone, check_backbone
from memgen.config import MemGenConfig
from memgen.insertion import (
    Plan,
    assemble,
    check_plan,
    predictor_index,
    stream_index,
    stream_length,
)
from memgen.lora import with_dropout
from memgen.trigger import Trigger
from memgen.weaver import Weaver


class Boundary(nnx.Variable):
    """The table of boundaries, fixed."""


class Woven(NamedTuple):
    """Streams with latents in them.

    Attributes:
        stream: `[B, S, D]` vectors that the reasoner reads.
        length: `[B]` int32 of them real.
        latents: `[B, E, K, D]`.
    """

    stream: jax.Array
    length: jax.Array
    latents: jax.Array


class MemGen(nnx.Module):
    """Latent memory for a frozen decoder.

    All weights of decoders are shared, none is copied: weaver and trigger are adapters beside
    them: a stage of training moves the variables of type `WeaverParam`, or of `TriggerParam`.

    Args:
        reasoner: a `DecoderBackbone`.
        config: of weaver and trigger.
        boundary: `[V]` table over the reasoner's ids (`memgen.boundary_table`).
        weaver_backbone: another decoder to weave with; the reasoner if not given.
        trigger_backbone: another decoder to trigger with, one of the same ids.
        rngs: for the initial values.

    Raises:
        ValueError: a decoder lacks a method, or sizes don't fit.
    """

    def __init__(
        self,
        reasoner: DecoderBackbone,
        config: MemGenConfig = MemGenConfig(),  # noqa: B008 (frozen)
        *,
        boundary: Any,
        weaver_backbone: DecoderBackbone | None = None,
        trigger_backbone: DecoderBackbone | None = None,
        rngs: nnx.Rngs,
    ):
        check_backbone(reasoner, "reasoner")
        self.config = config
        self.reasoner = nnx.data(reasoner)
        self.weaver_backbone = nnx.data(weaver_backbone)
        self.trigger_backbone = nnx.data(trigger_backbone)
        if len(boundary) != reasoner.vocab_size:
            raise ValueError(
                f"the boundary table has {len(boundary)} ids, the reasoner {reasoner.vocab_size}: "
                "make the table from the reasoner's tokenizer, filled up with empty texts"
            )
        self.boundary = Boundary(jnp.asarray(boundary, jnp.uint8))
        weaves = weaver_backbone or reasoner
        check_backbone(weaves, "weaver")
        self.weaver = Weaver(reasoner, weaves, config.weaver, rngs=rngs)
        self.trigger = self._make_trigger(rngs) if config.trigger is not None else None

    def _make_trigger(self, rngs: nnx.Rngs) -> Trigger:
        config, reasoner = self.config.trigger, self.reasoner
        assert config is not None
        backbone = self.trigger_backbone or reasoner
        check_backbone(backbone, "trigger")
        if config.source == "tokens" and backbone.vocab_size != reasoner.vocab_size:
            raise ValueError(
                f"a trigger of {backbone.vocab_size} ids can't read those of the reasoner, "
                f"{reasoner.vocab_size}: give a decoder with the same tokenizer"
            )
        if config.source == "stream" and backbone.embed_dim != reasoner.embed_dim:
            raise ValueError(
                f"a trigger of width {backbone.embed_dim} can't read the stream of width "
                f"{reasoner.embed_dim}: use source='tokens'"
            )
        reads = reasoner if config.source == "reasoner_hidden" else backbone
        return Trigger(reads, config, rngs=rngs)

    def with_reasoner(self, reasoner: DecoderBackbone) -> "MemGen":
        """The same weaver and trigger around another form of the reasoner."""
        leaves, structure = jax.tree.flatten(self)
        memgen: MemGen = jax.tree.unflatten(structure, leaves)
        memgen.reasoner = nnx.data(reasoner)
        return memgen

    def weaving(self, dropout: jax.Array | None = None) -> Any:
        """The decoder that weaves, its adapter beside it; `dropout` is a key, in training."""
        backbone = self.weaver_backbone or self.reasoner
        return backbone.apply_lora(with_dropout(self.weaver.adapter, dropout))

    def triggering(self) -> Any:
        """The decoder that triggers, its adapter beside it.

        Raises:
            ValueError: there is no trigger, or it reads the reasoner's hidden states.
        """
        trigger = self.checked_trigger()
        if trigger.adapter is None:
            raise ValueError("a trigger on the reasoner's hidden states has no decoder of its own")
        return (self.trigger_backbone or self.reasoner).apply_lora(trigger.adapter)

    def checked_trigger(self) -> Trigger:
        """The learned trigger; a ValueError where there is none."""
        if self.trigger is None:
            raise ValueError(
                "a learned trigger is asked for and this MemGen has none: set "
                "MemGenConfig(trigger=TriggerConfig(...)) and train it, or use AlwaysInvoke()"
            )
        return self.trigger

    def weave(self, tokens: jax.Array, plan: Plan, dropout: jax.Array | None = None) -> Woven:
        """Write the latents of all events, in order, into the rows of tokens.

        Args:
            tokens: `[B, L]` int32, padded on the right by any ids; events stand among real ones.
            plan: of `E` events.
            dropout: a key, in training; events that are woven in order have a mask each.

        Raises:
            ValueError: the plan is for other rows or of another width (checked unless traced).
        """
        check_plan(plan, tokens, self.config.weaver.latents)
        vectors = self.reasoner.embed_tokens(tokens)
        batch, length, dim = vectors.shape
        events, slots = plan.point.shape[1], self.config.weaver.latents
        latents = jnp.zeros((batch, events, slots, dim), vectors.dtype)
        if slots and self.config.weaver.context == "nothing":
            latents = self.weaver.fixed(plan.kind)
        elif slots and self.config.weaver.latents_see_latents:
            latents = self._in_order(vectors, latents, plan, dropout)
        elif slots:
            backbone = self.weaving(dropout)
            latents = self.weaver.weave_parallel(backbone, vectors, plan.point, plan.kind)
        whole = stream_length(plan, jnp.full((batch,), length, jnp.int32))
        return Woven(assemble(vectors, latents, plan), whole, latents)

    def _in_order(self, vectors, latents, plan: Plan, dropout) -> jax.Array:
        def event(latents, index):
            own = None if dropout is None else jax.random.fold_in(dropout, index)
            stream = assemble(vectors, latents, plan)
            length = jnp.take(plan.start, index, axis=1)
            if self.config.weaver.context == "hidden":
                stream = self.reasoner.hidden_states(stream, length)
            written = self.weaver.weave(
                self.weaving(own), stream, length, jnp.take(plan.kind, index, axis=1)
            )
            return latents.at[:, index].set(written.astype(latents.dtype)), None

        # Recomputed in the backward pass: only latents are kept from one event to the next.
        return jax.lax.scan(jax.checkpoint(event), latents, jnp.arange(plan.point.shape[1]))[0]

    def predictors(
        self, tokens: jax.Array, plan: Plan, dropout: jax.Array | None = None
    ) -> jax.Array:
        """The reasoner's hidden states that predict each token, `[B, L, D]`.

        The one of token `i` stands at its last latent, where an event precedes it, else at token
        `i - 1`. Nothing predicts a first token without an event: its state is some other one.
        """
        woven = self.weave(tokens, plan, dropout)
        hidden = self.reasoner.hidden_states(woven.stream, woven.length)
        at = jnp.maximum(predictor_index(plan, tokens.shape[1]), 0)
        return jnp.take_along_axis(hidden, at[..., None], axis=1)

    def trigger_logits(self, tokens: jax.Array, plan: Plan) -> jax.Array:
        """Skip and invoke logits before each token, `[B, L, 2]` float32, all in one pass.

        The decision before token `i` sees what stands before the latents that it may call for;
        before token 0 it sees nothing and its logits are zeros.
        """
        trigger = self.checked_trigger()
        length = tokens.shape[1]
        if trigger.config.source == "tokens":
            decoder = self.triggering()
            hidden = decoder.hidden_states(decoder.embed_tokens(tokens))
            at = jnp.broadcast_to(jnp.arange(length) - 1, tokens.shape)
        else:
            woven = self.weave(tokens, plan)
            own = trigger.config.source == "stream"
            decoder = self.triggering() if own else self.reasoner
            hidden = decoder.hidden_states(woven.stream, woven.length)
            here = plan.point[:, :, None] == jnp.arange(length)
            at = stream_index(plan, length) - (plan.width[:, :, None] * here).sum(axis=1) - 1
        chosen = jnp.take_along_axis(hidden, jnp.maximum(at, 0)[..., None], axis=1)
        return jnp.where(at[..., None] >= 0, trigger(chosen), 0.0)
