"""Generation interleaved with weaving: one compiled loop, every row at its own events.

A step decides, inserts, predicts, in this order. Latents are appended to the live cache of the
reasoner as a chunk, in the rows that weave alone; a step in which none weaves does nothing for it.
The event after the prompt comes before the loop, in all rows at once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.delimiters import is_boundary
from memgen.insertion import INFERENCE, PROMPT
from memgen.model import MemGen
from memgen.request import KeepMemory, Request, bucket, make_request, pad_prompts, row_keys
from memgen.response import Response
from memgen.session import RowChunk, Session, check_room, put, take
from memgen.trigger import AlwaysInvoke, NeverInvoke, TriggerPolicy
from memgen.weaver import Snippets


def generate(
    memgen: MemGen,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    policy: TriggerPolicy = AlwaysInvoke(),  # noqa: B008 (frozen)
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    valid_vocab_size: int | None = None,
    keep_memory: KeepMemory | None = None,
    retriever: Any = None,
) -> Response:
    """Continue each prompt; a row's text and events do not depend on the rest of its batch.

    Programs are compiled for the longest prompt and the longest text, both rounded up to powers of
    two; which rows weave when is not part of the program.

    Args:
        prompts: ids, at least one each.
        max_new_tokens: at most this many are added to each.
        policy: when to weave.
        temperature: 0 takes the most probable token.
        seed: a row's key is made of it, its prompt, and how many equal prompts stand before it.
        stop, valid_vocab_size, keep_memory, retriever: see `Request`.

    Raises:
        ValueError: an argument can't be used, or the logits are NaN.
    """
    request = make_request(
        memgen, max_new_tokens, policy, temperature, stop, valid_vocab_size, keep_memory, retriever
    )
    tokens, length = pad_prompts(prompts, memgen.reasoner.vocab_size)
    room = bucket(max_new_tokens)
    keys = row_keys(seed, prompts)
    session = begin(memgen, tokens, length, keys, tokens.shape[1] + room, request=request)
    response, _ = respond(memgen, session, request, room)
    bad = np.isnan(np.asarray(response.log_probs)).any(axis=1)
    if bad.any():
        raise ValueError(
            f"prompt {int(bad.argmax())}: the logits are NaN: check the parameters, or compute in "
            "float32"
        )
    return response


def begin(
    memgen: MemGen,
    tokens: jax.Array,
    length: jax.Array,
    keys: jax.Array,
    max_tokens: int,
    max_responses: int = 1,
    *,
    request: Request | None = None,
) -> Session:
    """Read the prompts `tokens [B, C]` of `length [B]` into a new session.

    Args:
        keys: `[B]`, one for each row.
        max_tokens: room in a row for tokens, responses among them.
        max_responses: room for the latents of so many.
        request: given if it retrieves, so that there is room for that.
    """
    if tokens.shape[1] > max_tokens:
        raise ValueError(
            f"prompts of {tokens.shape[1]} tokens, room for max_tokens={max_tokens}: make more room"
        )
    retriever = request.retriever if request else None
    snippets = retriever.max_snippet_tokens if retriever else 0
    return _begin(memgen, tokens, length, keys, max_tokens, max_responses, snippets)


@functools.partial(jax.jit, static_argnames=("max_tokens", "max_responses", "snippets"))
def _begin(memgen, tokens, length, keys, max_tokens, max_responses, snippets) -> Session:
    session = Session.start(memgen, keys, max_tokens, max_responses, snippets)
    return session.append_tokens(memgen, tokens, length, fresh=True)


def observe(memgen: MemGen, session: Session, tokens: jax.Array, length: jax.Array) -> Session:
    """Append tokens that somebody else wrote, `[B, C]` of `length [B]`, to the rows.

    Args:
        session: is used up.

    Raises:
        ValueError: the session has no room (under your own `jit` its rows become NaN).
    """
    check_room(session, length)
    return _observe(memgen, session, tokens, length)


@functools.partial(jax.jit, donate_argnames="session")
def _observe(memgen, session, tokens, length) -> Session:
    return session.append_tokens(memgen, tokens, length)


def respond(
    memgen: MemGen, session: Session, request: Request, room: int
) -> tuple[Response, Session]:
    """Write up to `room` tokens in each row, with memory where the policy asks for it.

    What is in the rows stays, latents of earlier responses too; begin anew with the text alone to
    go without them.

    Args:
        memgen, request: the model and how.
        session: is used up.
        room: static bound on new tokens; `request.max_new_tokens` may be less.

    Returns:
        the response, and the session after it.

    Raises:
        ValueError: the session has no room (under your own `jit` its rows become NaN), or none
            for what the request retrieves.
    """
    if request.retriever is not None and request.retriever.max_snippet_tokens > session.snippets:
        raise ValueError(
            f"the session has room for {session.snippets} retrieved tokens, the retriever gives "
            f"{request.retriever.max_snippet_tokens}: begin(..., request=request)"
        )
    if not isinstance(request.max_new_tokens, Tracer):
        never = isinstance(request.policy, NeverInvoke)
        new = np.minimum(room, np.asarray(request.max_new_tokens))
        check_room(session, new, 0 if never else memgen.config.room)
    return _respond(memgen, session, request, room, lanes_of(session))


def lanes_of(session: Session) -> int:
    """Rows that weave at a time: one of each shard of the session, so that shards work at once."""
    if isinstance(session.count, Tracer):
        return 1
    count = jnp.asarray(session.count)
    (shard,) = count.sharding.shard_shape(count.shape)
    return count.shape[0] // shard


@functools.partial(jax.jit, static_argnames=("room", "lanes"), donate_argnames="session")
def _respond(memgen, session, request, room, lanes) -> tuple[Response, Session]:
    decoders = Decoders.of(memgen)
    limit = jnp.minimum(request.max_new_tokens, room)
    loop = _opened(decoders, request, session, room)
    loop = jax.lax.while_loop(
        lambda loop: ~loop.done.all() & (loop.step < limit.max()),
        lambda loop: _step(decoders, request, limit, loop, lanes),
        loop,
    )
    return loop.response, loop.session


@dataclasses.dataclass(frozen=True)
class Decoders:
    """The three readers' decoders, prepared once before the loop."""

    memgen: MemGen  # its reasoner in the form for decoding
    weaver: Any
    trigger: Any

    @classmethod
    def of(cls, memgen: MemGen) -> "Decoders":
        weaver = memgen.weaving().for_decoding() if memgen.config.weaver.latents else None
        own = memgen.trigger is not None and memgen.trigger.adapter is not None
        trigger = memgen.triggering().for_decoding() if own else None
        return cls(memgen.with_reasoner(memgen.reasoner.for_decoding()), weaver, trigger)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """Carried from step to step; `step` is the number of the token to be written."""

    step: jax.Array
    events: jax.Array
    done: jax.Array
    session: Session
    response: Response


def _opened(decoders: Decoders, request: Request, session: Session, room: int) -> Loop:
    """The loop before its first step: the prompts' events, all rows at once, have happened."""
    memgen, batch = decoders.memgen, session.count.shape[0]
    vector = jax.eval_shape(memgen.reasoner.embed_tokens, session.tokens[:, :1])
    loop = Loop(
        jnp.int32(0),
        jnp.zeros((batch,), jnp.int32),
        jnp.broadcast_to(request.max_new_tokens < 1, (batch,)) | (session.count < 1),
        session.replace(responses=session.responses + 1),
        Response.empty(memgen, batch, room, vector),
    )
    return _remember(decoders, request, loop, ~loop.done, PROMPT, batch)[0]


def _step(decoders: Decoders, request: Request, limit: jax.Array, loop: Loop, lanes: int) -> Loop:
    memgen, most = decoders.memgen, decoders.memgen.config.max_inference_events
    invoke = jnp.zeros_like(loop.done)
    if most:
        previous, last = loop.session.last_two
        asked = ~loop.done & is_boundary(memgen.boundary[...], last, previous)
        asked &= (loop.events < most) & (loop.step > 0)
        loop, invoke = _remember(decoders, request, loop, asked, INFERENCE, lanes)
    session, response, live = loop.session, loop.response, ~loop.done
    key = _keys(session, loop.step)[0]
    logits = memgen.reasoner.unembed(session.reasoner.hidden)
    allowed = jnp.arange(logits.shape[-1]) < request.valid_vocab_size
    logits = jnp.where(allowed, logits, -jnp.inf)
    if request.temperature is None:
        chosen = logits.argmax(axis=-1).astype(jnp.int32)
    else:
        logits = logits / request.temperature
        chosen = jax.vmap(jax.random.categorical)(key, logits).astype(jnp.int32)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)[:, 0]
    column = lambda rows, value, none: jax.lax.dynamic_update_slice(  # noqa: E731
        rows, jnp.where(live, value, none).astype(rows.dtype)[:, None], (0, loop.step)
    )
    response = dataclasses.replace(
        response,
        tokens=column(response.tokens, chosen, 0),
        log_probs=column(response.log_probs, log_prob, 0.0),
        count=response.count + live,
    )
    session = session.append_tokens(memgen, chosen[:, None], live.astype(jnp.int32))
    ended = (chosen[:, None] == request.stop).any(axis=1) | (response.count >= limit)
    return Loop(
        loop.step + 1,
        loop.events + invoke,
        loop.done | ended | jnp.isnan(log_prob),
        session,
        response,
    )


def _remember(
    decoders: Decoders, request: Request, loop: Loop, asked: jax.Array, kind: int, lanes: int
) -> tuple[Loop, jax.Array]:
    """Decide in the rows that are asked, weave in those that invoke, and who did."""
    memgen, invoke = decoders.memgen, jnp.zeros_like(asked)
    _, to_decide, to_keep = _keys(loop.session, loop.step)
    if not isinstance(request.policy, NeverInvoke):
        session, invoke = when(
            asked.any(),
            lambda carry: _decide(decoders, request, carry[0], asked, to_decide),
            (loop.session, invoke),
        )
        loop = dataclasses.replace(loop, session=session)
        if memgen.config.weaver.latents:
            loop, invoke = when(
                invoke.any(),
                lambda carry: _weave(decoders, request, carry[0], carry[1], to_keep, kind, lanes),
                (loop, invoke),
            )
    here = jnp.broadcast_to(loop.step, asked.shape)
    decisions = put(loop.response.decisions, invoke[:, None], here, asked.astype(jnp.int32))
    response = dataclasses.replace(loop.response, decisions=decisions)
    return dataclasses.replace(loop, response=response), invoke


def _decide(decoders, request, session: Session, asked, keys) -> tuple[Session, jax.Array]:
    """Consult the policy in the rows that are asked."""
    memgen = decoders.memgen
    if not request.policy.learned:
        logits = jnp.zeros((asked.shape[0], 2))
    elif session.trigger is None:
        logits = memgen.checked_trigger()(session.reasoner.hidden)
    else:
        fetch, target = session.trigger_sees(memgen, decoders.trigger)
        reader = session.trigger.extend_to(decoders.trigger, fetch, target, asked)
        session = session.replace(trigger=reader)
        logits = memgen.checked_trigger()(reader.hidden)
    return session, asked & request.policy(logits, keys)


def _weave(
    decoders: Decoders, request: Request, loop: Loop, invoke, keys, kind: int, lanes: int
) -> tuple[Loop, jax.Array]:
    """Write memory into the rows that invoke; those whose memory is not kept do not.

    One row of each lane at a time is taken out of the session and put back: the work grows with the
    rows that weave, not with the batch. Where each row is a lane, all are read at once.
    """
    response, batch = loop.response, invoke.shape[0]
    trigger, session = loop.session.trigger, loop.session.replace(trigger=None)
    snippets = None
    if request.retriever is not None:
        snippets = _retrieved(decoders.memgen, request.retriever, session, invoke)
    given = jnp.full((batch,), kind), keys, snippets
    if lanes == batch:
        session, latents, kept = _weave_rows(decoders, request, session, invoke, *given)
    else:
        session, latents, kept = _weave_in_turn(decoders, request, session, invoke, given, lanes)
    once = kept.astype(jnp.int32)
    event = jnp.zeros_like(loop.events) if kind == PROMPT else 1 + loop.events
    response = dataclasses.replace(
        response,
        latents=put(response.latents, latents[:, None], event, once),
        points=put(response.points, jnp.full((batch, 1), loop.step), event, once),
    )
    session = session.replace(trigger=trigger)
    return dataclasses.replace(loop, session=session, response=response), kept


def _weave_in_turn(
    decoders: Decoders, request: Request, session: Session, invoke, given: tuple, lanes: int
) -> tuple[Session, jax.Array, jax.Array]:
    """As `_weave_rows`, one row of each lane at a time; `given` is what that is told of rows."""
    vector = jax.eval_shape(decoders.memgen.reasoner.embed_tokens, session.tokens[:, :1])
    slots = decoders.memgen.config.weaver.latents
    none = jnp.zeros((invoke.shape[0], slots, vector.shape[-1]), vector.dtype)
    axes = session.row_axes(decoders.memgen.reasoner, decoders.weaver, None)

    def weave_next(state):
        waiting, session, latents, kept = state
        chosen = RowChunk.next(waiting, lanes)
        weaves = chosen.take(waiting)
        rows, new, keep = _weave_rows(
            decoders, request, chosen.take(session, axes), weaves, *chosen.take(given)
        )
        new = jnp.where(keep[:, None, None], new.astype(latents.dtype), chosen.take(latents))
        return (
            chosen.put(waiting, jnp.zeros_like(weaves)),
            chosen.put(session, rows, axes),
            chosen.put(latents, new),
            chosen.put(kept, chosen.take(kept) | keep),
        )

    state = invoke, session, none, jnp.zeros_like(invoke)
    return jax.lax.while_loop(lambda state: state[0].any(), weave_next, state)[1:]


def _weave_rows(
    decoders: Decoders,
    request: Request,
    session: Session,
    weaves: jax.Array,
    kind: jax.Array,
    keys: jax.Array,
    snippets: Snippets | None,
) -> tuple[Session, jax.Array, jax.Array]:
    """The session of some rows after an event in those that weave, latents, and who kept them."""
    memgen, weaver = decoders.memgen, decoders.memgen.weaver
    width = weaver.width(kind)
    if session.weaver is None:
        latents = weaver.fixed(kind)
    else:
        latents, session = _read_and_weave(decoders, session, kind, weaves, snippets)
    real = jnp.arange(weaver.config.latents) < width[:, None]
    latents = jnp.where(real[..., None], latents, 0)
    if request.keep_memory is not None:
        weaves &= request.keep_memory(latents, real, keys)
    session = session.append(memgen, latents, jnp.where(weaves, width, 0))
    return session, latents, weaves


def _read_and_weave(
    decoders: Decoders,
    session: Session,
    kind: jax.Array,
    weaves: jax.Array,
    snippets: Snippets | None,
) -> tuple[jax.Array, Session]:
    """Latents `[G, K, D]` of the rows that weave, and the session with the weaver up to date."""
    memgen, weaver = decoders.memgen, decoders.memgen.weaver
    assert session.weaver is not None
    fetch, target = session.weaver_sees(memgen)
    reader = session.weaver.extend_to(decoders.weaver, fetch, target, weaves)
    suffix, first = weaver.suffix(kind, snippets)
    slots = weaver.config.latents
    # The queries are read and forgotten: the cache without them lives on.
    hidden, _ = decoders.weaver.extend(reader.cache, suffix, jnp.where(weaves, first + slots, 0))
    latents = weaver.memory(take(hidden, first[:, None] + jnp.arange(slots)))
    return latents, session.replace(weaver=reader)


def _retrieved(memgen, retriever, session: Session, invoke) -> Snippets:
    batch = invoke.shape[0]
    shapes = (
        jax.ShapeDtypeStruct((batch, retriever.max_snippet_tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    ids, length = jax.pure_callback(
        retriever.retrieve, shapes, session.tokens, session.count, invoke
    )
    return Snippets(memgen.reasoner.embed_tokens(ids), length)


def when(predicate: jax.Array, change: Callable, carry: Any) -> Any:
    """`change(carry)` if the predicate holds, at no cost if not.

    A loop of one round: caches in a loop's carry are changed in place, those that go through a
    conditional may be copied.
    """
    once = jax.lax.while_loop(
        lambda state: state[0], lambda state: (jnp.bool_(False), change(state[1])),
        (predicate, carry),
    )  # fmt: skip
    return once[1]


def _keys(session: Session, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys `[B]` of a step: to choose a token, to decide, and to keep memory."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    here = fold(jax.vmap(jax.random.fold_in)(session.keys, session.responses), step)
    return fold(here, 0), fold(here, 1), fold(here, 2)
