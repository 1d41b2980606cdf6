"""MemGen: a frozen reasoner, a weaver and a trigger (arXiv 2509.24704)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer

from memgen.backbone import DecoderBackbone, check_backbone
from memgen.checks import check_config, check_rngs, checked_ids
from memgen.config import MemGenConfig
from memgen.insertion import (
    Plan,
    assemble,
    check_plan,
    predictor_index,
    token_index,
    woven_length,
)
from memgen.lora import with_dropout
from memgen.module import Module
from memgen.placement import AnyArray, broadcast_beside, embed, placed_beside, row_shards
from memgen.segments import Schedule, schedule_for, weave_in_segments
from memgen.short_repr import short_repr
from memgen.trigger import Trigger
from memgen.weaver import Weaver

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int, Key


def check_memgen(memgen: Any) -> None:
    """Raise a ValueError unless `memgen` is a `MemGen`."""
    if not isinstance(memgen, MemGen):
        raise ValueError(
            f"a {type(memgen).__name__} in place of a MemGen: give MemGen(decoder, ...)"
        )


class Boundary(nnx.Variable):
    """Variable that holds the flags of `boundary_table`, `[V]` uint8; it is not trained."""


class Woven(NamedTuple):
    """Input sequences of the reasoner: embedded tokens with the latents of all events inserted.

    Attributes:
        inputs_embeds: `[B, S, D]` input vectors of the reasoner, padded on the right: `S = L + E*K`
            for `L` tokens, `E` events and `K` latent slots of an event.
        length: `[B]` int32, number of real vectors in each row, tokens and latents.
        latents: `[B, E, K, D]` latents of each event.
    """

    inputs_embeds: jax.Array
    length: jax.Array
    latents: jax.Array

    __repr__ = short_repr


class MemGen(Module):
    """A frozen decoder with latent memory: reasoner, weaver and trigger (arXiv 2509.24704).

    Weaver and trigger consist of LoRA adapters on decoders and of small layers of their own. The
    decoders' parameters are shared and never copied. A training stage updates either the variables
    of type `WeaverParam` or the variables of type `TriggerParam`.

    Args:
        reasoner: Frozen decoder that generates text.
        config: Sizes and options of weaver, trigger and events.
        boundary: `[V]` uint8 array, flags of each token id (`memgen.boundary_table`).
        weaver_backbone: Decoder of the weaver; by default the reasoner.
        trigger_backbone: Decoder of the trigger; by default the reasoner. With the trigger's source
            "tokens", the decoder must have the reasoner's vocabulary; with "stream", the reasoner's
            width.
        rngs: PRNG keys that initialise weaver and trigger.
        kernel_init: Initializer of the kernels of the weaver's projections and of the trigger's
            head; by default as documented in `Weaver` and `Trigger`.
        param_dtype: Dtype of the weaver's and the trigger's parameters, except their adapters,
            which are float32.

    Raises:
        ValueError: A decoder lacks a method, the table of boundaries does not have one entry for
            each token id, or the trigger's decoder does not fit the trigger's source.
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
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        check_backbone(reasoner, "reasoner")
        check_config(config, MemGenConfig)
        self.config = config
        self.reasoner = nnx.data(reasoner)
        self.weaver_backbone = nnx.data(weaver_backbone)
        self.trigger_backbone = nnx.data(trigger_backbone)
        check_rngs(rngs)
        if np.ndim(boundary) != 1:
            raise ValueError(
                f"a boundary table of shape {np.shape(boundary)}: give one number for each id, as "
                "memgen.boundary_table makes it"
            )
        if len(boundary) != reasoner.vocab_size:
            raise ValueError(
                f"the boundary table has {len(boundary)} ids, the reasoner {reasoner.vocab_size}: "
                "make the table from the reasoner's tokenizer, padded with empty texts"
            )
        self.boundary = Boundary(jnp.asarray(boundary, jnp.uint8))
        weaver_decoder = weaver_backbone or reasoner
        check_backbone(weaver_decoder, "weaver")
        options: Any = {"rngs": rngs, "kernel_init": kernel_init, "param_dtype": param_dtype}
        self.weaver = Weaver(reasoner, weaver_decoder, config.weaver, **options)
        self.trigger = self._make_trigger(options) if config.trigger is not None else None

    def _make_trigger(self, options: dict[str, Any]) -> Trigger:
        config, reasoner = self.config.trigger, self.reasoner
        assert config is not None
        backbone = self.trigger_backbone or reasoner
        check_backbone(backbone, "trigger")
        if config.source == "tokens" and backbone.vocab_size != reasoner.vocab_size:
            raise ValueError(
                f"a trigger of {backbone.vocab_size} ids does not fit a reasoner of "
                f"{reasoner.vocab_size}: give a decoder with the same tokenizer"
            )
        if config.source == "stream" and backbone.embed_dim != reasoner.embed_dim:
            raise ValueError(
                f"a trigger of width {backbone.embed_dim} does not fit the stream of width "
                f"{reasoner.embed_dim}: use source='tokens'"
            )
        decoder = reasoner if config.source == "reasoner_hidden" else backbone
        return Trigger(decoder, config, **options)

    def with_reasoner(self, reasoner: DecoderBackbone) -> MemGen:
        """Return a copy with another reasoner; the copy shares all other arrays."""
        leaves, structure = jax.tree.flatten(self)
        memgen: MemGen = jax.tree.unflatten(structure, leaves)
        memgen.reasoner = nnx.data(reasoner)
        return memgen

    def for_decoding(self) -> MemGen:
        """Return a copy with all decoders in their fastest form for decoding, for many calls."""
        memgen = self.with_reasoner(self.reasoner.for_decoding())
        for name in ("weaver_backbone", "trigger_backbone"):
            if (decoder := getattr(self, name)) is not None:
                setattr(memgen, name, nnx.data(decoder.for_decoding()))
        return memgen

    def weaving(self, dropout: jax.Array | None = None) -> Any:
        """Return the weaver's decoder with the weaver's adapter.

        Args:
            dropout: PRNG key of the adapter's dropout; None switches dropout off.
        """
        backbone = self.weaver_backbone or self.reasoner
        return backbone.apply_lora(with_dropout(self.weaver.adapter, dropout))

    def triggering(self) -> Any:
        """Return the trigger's decoder with the trigger's adapter.

        Raises:
            ValueError: There is no trigger, or the trigger has no decoder because its input is the
                reasoner's hidden state.
        """
        trigger = self.checked_trigger()
        if trigger.adapter is None:
            raise ValueError("a trigger on the reasoner's hidden states has no decoder of its own")
        return (self.trigger_backbone or self.reasoner).apply_lora(trigger.adapter)

    def checked_trigger(self) -> Trigger:
        """Return the learned trigger; raise a ValueError if there is none."""
        if self.trigger is None:
            raise ValueError(
                "the policy needs a learned trigger and this MemGen has none: set "
                "MemGenConfig(trigger=TriggerConfig(...)) and train it, or use AlwaysInvoke()"
            )
        return self.trigger

    def weave(
        self, tokens: Int[AnyArray, "B L"], plan: Plan, dropout: Key[Array, ""] | None = None
    ) -> Woven:
        """Embed tokens, and insert the latents that the weaver writes for all events of a plan.

        Args:
            tokens: Token ids, padded on the right with any ids of the vocabulary.
            plan: Events of each row; each event must stand before a real token.
            dropout: PRNG key of the adapter's dropout, for training; None switches dropout off.
                With `latents_see_latents`, each event has its own dropout mask.

        Returns:
            Input sequences of the reasoner, their lengths, and the latents.

        Raises:
            ValueError: The tokens are not integers `[B, L]`, or the plan does not fit the tokens or
                the config (the plan's values are checked unless traced).
        """
        tokens = checked_ids(tokens)
        check_plan(plan, tokens, self.config.weaver.latents)
        vectors = embed(self.reasoner, tokens)
        batch, length, dim = vectors.shape
        events, slots = plan.point.shape[1], self.config.weaver.latents
        latents = placed_beside(jnp.zeros((batch, events, slots, dim), vectors.dtype), vectors)
        if not slots or not events:
            pass  # nothing is inserted
        elif self.config.weaver.context == "nothing":
            latents = self.weaver.fixed(plan.kind)
        elif self.config.weaver.latents_see_latents:
            latents = self._in_order(vectors, latents, plan, dropout)
        else:
            backbone = self.weaving(dropout)
            latents = self.weaver.weave_parallel(backbone, vectors, plan.point, plan.kind)
        whole = woven_length(plan, broadcast_beside(length, vectors, 1))
        return Woven(assemble(vectors, latents, plan), whole, latents)

    def _in_order(self, vectors, latents, plan: Plan, dropout) -> jax.Array:
        sizes = *vectors.shape[:2], plan.point.shape[1]
        schedule = self.schedule(sizes, dropout is not None, row_shards(vectors))
        if schedule is not None:
            decoders = self.weaving().for_decoding(), self.reasoner.for_decoding()
            return weave_in_segments(self.weaver, *decoders, vectors, plan, schedule)

        def event(latents, index):
            key = None if dropout is None else jax.random.fold_in(dropout, index)
            context = assemble(vectors, latents, plan)
            length = jnp.take(plan.start, index, axis=1)
            if self.config.weaver.context == "hidden":
                context = self.reasoner.hidden_states(context, length)
            written = self.weaver.weave(
                self.weaving(key), context, length, jnp.take(plan.kind, index, axis=1)
            )
            return latents.at[:, index].set(written.astype(latents.dtype)), None

        # The backward pass recomputes each event: of the forward pass, only latents are kept.
        return jax.lax.scan(jax.checkpoint(event), latents, jnp.arange(plan.point.shape[1]))[0]

    def schedule(
        self, sizes: tuple[int, int, int], dropout: bool, shards: int = 1
    ) -> Schedule | None:
        """Choose how `weave` computes events whose context includes the latents of earlier events.

        Args:
            sizes: Number of rows, number of tokens per row, and number of events per row.
            dropout: Whether `weave` is called with a dropout key.
            shards: Number of shards into which the rows are split over devices.

        Returns:
            Schedule by which all events are woven over one cache; None to weave each event by its
            own forward pass over the entire row.
        """
        if dropout and self.config.weaver.lora.dropout:
            return None  # each event has its own dropout mask over its whole context
        decoder = self.weaver_backbone or self.reasoner
        return schedule_for(self.weaver, decoder, self.reasoner, sizes, shards)

    def predictors(
        self, tokens: Int[AnyArray, "B L"], plan: Plan, dropout: Key[Array, ""] | None = None
    ) -> Float[Array, "B L D"]:
        """Compute the reasoner's hidden states from which each token is predicted.

        If an event stands right before token `i`, token `i` is predicted from the hidden state at
        the event's last latent, otherwise from the hidden state at token `i - 1`. For a row's first
        token without an event before it, the entry is arbitrary. Arguments and errors are as in
        `weave`.
        """
        woven = self.weave(tokens, plan, dropout)
        hidden = self.reasoner.hidden_states(woven.inputs_embeds, woven.length)
        at = jnp.maximum(predictor_index(plan, jnp.shape(tokens)[1]), 0)
        return jnp.take_along_axis(hidden, at[..., None], axis=1)

    def trigger_logits(self, tokens: Int[AnyArray, "B L"], plan: Plan) -> Float[Array, "B L 2"]:
        """Compute the trigger's float32 logits (skip, invoke) before each token.

        The logits before token `i` depend on the earlier tokens and, unless the trigger's source is
        "tokens", on the latents of earlier events, but not on the latents of an event right before
        token `i`. The logits before token 0, which have no input, are zeros.

        Args:
            tokens: Token ids, padded on the right.
            plan: Events of each row.

        Raises:
            ValueError: There is no trigger, or the tokens or the plan do not fit (as in `weave`).
        """
        trigger = self.checked_trigger()
        tokens = checked_ids(tokens)
        length = tokens.shape[1]
        if trigger.config.source == "tokens":
            decoder = self.triggering()
            hidden = decoder.hidden_states(embed(decoder, tokens))
            at = broadcast_beside(jnp.arange(length) - 1, tokens, 2)
        else:
            woven = self.weave(tokens, plan)
            adapted = trigger.config.source == "stream"
            decoder = self.triggering() if adapted else self.reasoner
            hidden = decoder.hidden_states(woven.inputs_embeds, woven.length)
            before = plan.point[:, :, None] == jnp.arange(length)
            at = token_index(plan, length) - (plan.width[:, :, None] * before).sum(axis=1) - 1
        chosen = jnp.take_along_axis(hidden, jnp.maximum(at, 0)[..., None], axis=1)
        return jnp.where(at[..., None] >= 0, trigger(chosen), 0.0)
