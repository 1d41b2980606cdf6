"""Events of generation: the trigger decides in some rows, the weaver writes latents into some."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memgen.insertion import PROMPT
from memgen.model import MemGen
from memgen.placement import broadcast_beside, embed, placed_beside
from memgen.request import Request
from memgen.response import Response
from memgen.session import RowChunk, Session, put, take
from memgen.short_repr import ShortRepr, short_repr
from memgen.trigger import NeverInvoke
from memgen.weaver import Snippets


@dataclasses.dataclass(frozen=True)
class Decoders:
    """The decoders in their form for decoding, prepared once before the loop.

    Attributes:
        memgen: Model whose reasoner has that form.
        weaver: Decoder with the weaver's adapter, or None without latents.
        trigger: Decoder with the trigger's adapter, or None where it needs no decoder.
    """

    memgen: MemGen
    weaver: Any
    trigger: Any

    @classmethod
    def prepare(cls, memgen: MemGen) -> "Decoders":
        weaver = memgen.weaving().for_decoding() if memgen.config.weaver.latents else None
        adapted = memgen.trigger is not None and memgen.trigger.adapter is not None
        trigger = memgen.triggering().for_decoding() if adapted else None
        return cls(memgen.with_reasoner(memgen.reasoner.for_decoding()), weaver, trigger)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Loop(ShortRepr):
    """State of the generation loop between two steps.

    Attributes:
        step: Index of the token that the step generates, an int32 scalar.
        events: `[B]` int32, events of each row so far, the prompt's not counted.
        done: `[B]` bool, rows that are finished.
        session: Session so far.
        response: Response so far.
    """

    step: jax.Array
    events: jax.Array
    done: jax.Array
    session: Session
    response: Response


class EventInputs(NamedTuple):
    """Inputs of an event, by row.

    Attributes:
        kind: `[B]` int32, `PROMPT` or `INFERENCE`.
        keys: `[B]` random keys for `Request.keep_memory`.
        snippets: Retrieved text, or None without a retriever.
    """

    kind: jax.Array
    keys: jax.Array
    snippets: Snippets | None

    __repr__ = short_repr


def memory_event(
    decoders: Decoders, request: Request, loop: Loop, boundary: jax.Array, kind: int, chunk: int
) -> tuple[Loop, jax.Array]:
    """Decide in the rows that are at a `boundary`, weave in those that invoke the weaver.

    Returns:
        The loop after that, and `[B]` bool, the rows that wove and kept their latents.
    """
    memgen, invoked = decoders.memgen, jnp.zeros_like(boundary)
    _, decision_keys, event_keys = loop.session.step_keys(loop.step)
    if not isinstance(request.policy, NeverInvoke):

        def decide(state: tuple[Session, jax.Array]) -> tuple[Session, jax.Array]:
            return _decide(decoders, request, state[0], boundary, decision_keys)

        def weave(state: tuple[Loop, jax.Array]) -> tuple[Loop, jax.Array]:
            return _weave(decoders, request, state[0], state[1], event_keys, kind, chunk)

        session, invoked = apply_if(boundary.any(), decide, (loop.session, invoked))
        loop = dataclasses.replace(loop, session=session)
        if memgen.config.weaver.latents:
            loop, invoked = apply_if(invoked.any(), weave, (loop, invoked))
    step = broadcast_beside(loop.step, boundary, 1)
    decisions = put(loop.response.decisions, invoked[:, None], step, boundary.astype(jnp.int32))
    response = dataclasses.replace(loop.response, decisions=decisions)
    return dataclasses.replace(loop, response=response), invoked


def _decide(
    decoders: Decoders, request: Request, session: Session, boundary: jax.Array, keys: jax.Array
) -> tuple[Session, jax.Array]:
    """The session with the trigger's cache up to date, and `[B]` bool: invoke the weaver."""
    memgen = decoders.memgen
    if not request.policy.learned:
        logits = placed_beside(jnp.zeros((boundary.shape[0], 2)), boundary)
    elif session.trigger is None:
        logits = memgen.checked_trigger()(session.reasoner.hidden)
    else:
        fetch, target = session.trigger_inputs(memgen, decoders.trigger)
        state = session.trigger.extend_to(decoders.trigger, fetch, target, boundary)
        session = session.replace(trigger=state)
        logits = memgen.checked_trigger()(state.hidden)
    return session, boundary & request.policy(logits, keys)


def _weave(
    decoders: Decoders,
    request: Request,
    loop: Loop,
    invoked: jax.Array,
    keys: jax.Array,
    kind: int,
    chunk: int,
) -> tuple[Loop, jax.Array]:
    """Weave in the rows `invoked`, `chunk` rows at a time; also the rows that kept their latents.

    The work grows with the rows that weave, not with the batch, unless the chunk is the batch.
    """
    response, batch = loop.response, invoked.shape[0]
    # The trigger's cache is not touched, so it need not go through the loop over chunks.
    trigger, session = loop.session.trigger, loop.session.replace(trigger=None)
    snippets = None
    if request.retriever is not None:
        snippets = _retrieve(decoders.memgen, request.retriever, session, invoked)
    inputs = EventInputs(broadcast_beside(kind, invoked, 1), keys, snippets)
    weave = _weave_rows if chunk == batch else functools.partial(_weave_chunks, chunk)
    session, latents, kept = weave(decoders, request, session, invoked, inputs)
    once = kept.astype(jnp.int32)
    event = jnp.zeros_like(loop.events) if kind == PROMPT else 1 + loop.events
    response = dataclasses.replace(
        response,
        latents=put(response.latents, latents[:, None], event, once),
        points=put(response.points, broadcast_beside(loop.step, invoked, 1)[:, None], event, once),
    )
    session = session.replace(trigger=trigger)
    return dataclasses.replace(loop, session=session, response=response), kept


def _weave_chunks(
    chunk: int,
    decoders: Decoders,
    request: Request,
    session: Session,
    invoked: jax.Array,
    inputs: EventInputs,
) -> tuple[Session, jax.Array, jax.Array]:
    """`_weave_rows` of one chunk of rows after the other, as long as rows are left that weave."""
    vector = jax.eval_shape(embed, decoders.memgen.reasoner, session.tokens[:, :1])
    slots = decoders.memgen.config.weaver.latents
    axes = session.batch_axes(decoders.memgen.reasoner, decoders.weaver, None)

    def some_left(state):
        return state[0].any()

    def weave_chunk(state):
        left, session, latents, kept = state
        rows = RowChunk.next(left, chunk)
        weaves = rows.take(left)
        part, new, keep = _weave_rows(
            decoders, request, rows.take(session, axes), weaves, rows.take(inputs)
        )
        new = jnp.where(keep[:, None, None], new.astype(latents.dtype), rows.take(latents))
        return (
            rows.put(left, jnp.zeros_like(weaves)),
            rows.put(session, part, axes),
            rows.put(latents, new),
            rows.put(kept, rows.take(kept) | keep),
        )

    latents = jnp.zeros((invoked.shape[0], slots, vector.shape[-1]), vector.dtype)
    latents = placed_beside(latents, invoked)
    state = invoked, session, latents, jnp.zeros_like(invoked)
    return jax.lax.while_loop(some_left, weave_chunk, state)[1:]


def _weave_rows(
    decoders: Decoders,
    request: Request,
    session: Session,
    weaves: jax.Array,
    inputs: EventInputs,
) -> tuple[Session, jax.Array, jax.Array]:
    """An event in the rows that weave: session after it, latents, and the rows that kept them."""
    memgen, weaver = decoders.memgen, decoders.memgen.weaver
    width = weaver.width(inputs.kind)
    if session.weaver is None:
        latents = weaver.fixed(inputs.kind)
    else:
        latents, session = _weave_from_context(decoders, session, weaves, inputs)
    real = jnp.arange(weaver.config.latents) < width[:, None]
    latents = jnp.where(real[..., None], latents, 0)
    if request.keep_memory is not None:
        weaves &= request.keep_memory(latents, real, inputs.keys)
    session = session.append(memgen, latents, jnp.where(weaves, width, 0))
    return session, latents, weaves


def _weave_from_context(
    decoders: Decoders, session: Session, weaves: jax.Array, inputs: EventInputs
) -> tuple[jax.Array, Session]:
    """Latents `[R, K, D]` of the rows that weave, and the session with the weaver up to date."""
    memgen, weaver = decoders.memgen, decoders.memgen.weaver
    assert session.weaver is not None
    fetch, target = session.weaver_inputs(memgen)
    suffix, first = weaver.suffix(inputs.kind, inputs.snippets)
    slots = weaver.config.latents
    if getattr(decoders.weaver, "can_forget", False):
        hidden, state = session.weaver.extend_and_query(
            decoders.weaver, fetch, target, weaves, suffix, first + slots
        )
    else:
        state = session.weaver.extend_to(decoders.weaver, fetch, target, weaves)
        # Snippets and queries leave no trace: the session keeps the cache without them.
        hidden, _ = decoders.weaver.extend(state.cache, suffix, jnp.where(weaves, first + slots, 0))
    latents = weaver.memory(take(hidden, first[:, None] + jnp.arange(slots)))
    return latents, session.replace(weaver=state)


def _retrieve(memgen: MemGen, retriever: Any, session: Session, invoked: jax.Array) -> Snippets:
    """Snippets for the rows `invoked`, found on the host."""
    batch = invoked.shape[0]
    shapes = (
        jax.ShapeDtypeStruct((batch, retriever.max_snippet_tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    ids, length = jax.pure_callback(
        retriever.retrieve, shapes, session.tokens, session.count, invoked
    )
    ids, length = placed_beside((ids, length), invoked)
    return Snippets(embed(memgen.reasoner, ids), length)


def apply_if(predicate: jax.Array, update: Callable, state: Any) -> Any:
    """`update(state)` if the scalar predicate holds, else `state` at no cost.

    What `lax.cond` computes, as a `while_loop` of at most one round: XLA updates a loop's carry in
    place, whereas it may copy caches that pass through a conditional.
    """
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), update(carry[1])),
        (predicate, state),
    )[1]
