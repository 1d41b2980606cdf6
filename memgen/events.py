"""Events of generation: the trigger decides which rows weave, the weaver writes their latents."""

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
    """Decoders in the form that decodes fastest (`for_decoding`), prepared once before the loop.

    Attributes:
        memgen: Model whose reasoner has the form for decoding.
        weaver: Decoder with the weaver's adapter, in the form for decoding; None if events have no
            latents.
        trigger: Decoder with the trigger's adapter, in the form for decoding; None without a
            learned trigger, or if the trigger reads the reasoner's hidden states.
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
        step: Index of the new token that the next step generates, an int32 scalar.
        events: `[B]` int32, number of events of each row so far, not counting the event before the
            first token.
        done: `[B]` bool, True for finished rows.
        session: Session so far.
        response: Response so far.
    """

    step: jax.Array
    events: jax.Array
    done: jax.Array
    session: Session
    response: Response


class EventInputs(NamedTuple):
    """Inputs of one event in each row.

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
    """Let the policy decide in the rows `boundary [B]`, and weave in the rows that invoke.

    Returns:
        Loop after the event, and `[B]` bool: True for rows that invoked the weaver and whose
        latents `keep_memory` kept.
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
    """Decide; return the session with the trigger's cache up to date, and `[B]` bool: invoked."""
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
    """Weave in the rows `invoked`, `chunk` rows at a time; return the loop and the rows kept.

    The work grows with the number of rows that weave, not with the batch (unless `chunk` is the
    batch). The rows kept, `[B]` bool, are the rows whose latents `keep_memory` did not drop.
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
    """Apply `_weave_rows` to one chunk of rows after the other until no row is left to weave."""
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
    """Weave in some rows; return the session, the latents `[R, K, D]`, and the rows kept `[R]`."""
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
    """Return latents `[R, K, D]`, and the session with the weaver's cache up to date."""
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
    """Query the retriever on the host for the rows `invoked`."""
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
    """Return `update(state)` if the scalar predicate holds, else `state` at no cost.

    This is `lax.cond` written as a `while_loop` of at most one round, because XLA updates a loop's
    carry in place, whereas it may copy caches that pass through a conditional.
    """
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), update(carry[1])),
        (predicate, state),
    )[1]
