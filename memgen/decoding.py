"""Generation interleaved with weaving: one compiled loop, every row at its own events.

A step decides, inserts, predicts, in this order. Latents are appended to the live cache of the
reasoner as a chunk; a step in which no row weaves does nothing for weaving.
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
from memgen.session import Session, check_room, put, take
from memgen.trigger import AlwaysInvoke, NeverInvoke, TriggerPolicy
from memgen.weaver import Snippets

NOT_ASKED, SKIPPED, INVOKED = -1, 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Response:
    """New tokens of each row and what was remembered on the way.

    Attributes:
        tokens: `[B, T]` int32, the id that stopped a row among them.
        count: `[B]` int32 of them real.
        log_probs: `[B, T]` float32 of each, at the temperature of sampling (1 if greedy).
        decisions: `[B, T]` int8 before each token: -1 not asked, 0 skipped, 1 invoked.
        latents: `[B, E, K, D]`; event 0 stands before the first token.
        points: `[B, E]` int32, the token that each event stands before, -1 if it did not happen.
    """

    tokens: jax.Array
    count: jax.Array
    log_probs: jax.Array
    decisions: jax.Array
    latents: jax.Array
    points: jax.Array

    @classmethod
    def empty(cls, memgen: MemGen, batch: int, room: int, vector: Any) -> "Response":
        config = memgen.config
        latents = (batch, config.events, config.weaver.latents, vector.shape[-1])
        return cls(
            jnp.zeros((batch, room), jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch, room), jnp.float32),
            jnp.full((batch, room), NOT_ASKED, jnp.int8),
            jnp.zeros(latents, vector.dtype),
            jnp.full((batch, config.events), -1, jnp.int32),
        )

    @property
    def texts(self) -> list[list[int]]:
        """The new ids of each row."""
        rows = zip(np.asarray(self.tokens), np.asarray(self.count), strict=True)
        return [row[:count].tolist() for row, count in rows]


def generate(
    memgen: MemGen,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    policy: TriggerPolicy = AlwaysInvoke(),  # noqa: B008 (frozen)
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    choices: int | None = None,
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
        stop, choices, keep_memory, retriever: see `Request`.

    Raises:
        ValueError: an argument can't be used, or the logits are NaN.
    """
    request = make_request(
        memgen, max_new_tokens, policy, temperature, stop, choices, keep_memory, retriever
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
    return _respond(memgen, session, request, room)


@functools.partial(jax.jit, static_argnames="room", donate_argnames="session")
def _respond(memgen, session, request, room) -> tuple[Response, Session]:
    decoders = Decoders.of(memgen)
    batch = session.count.shape[0]
    vector = jax.eval_shape(memgen.reasoner.embed_tokens, session.tokens[:, :1])
    loop = Loop(
        jnp.int32(0),
        jnp.zeros((batch,), jnp.int32),
        jnp.broadcast_to(request.max_new_tokens < 1, (batch,)) | (session.count < 1),
        session.replace(responses=session.responses + 1),
        Response.empty(memgen, batch, room, vector),
    )
    limit = jnp.minimum(request.max_new_tokens, room)
    loop = jax.lax.while_loop(
        lambda loop: ~loop.done.all() & (loop.step < limit.max()),
        lambda loop: _step(decoders, request, limit, loop),
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


def _step(decoders: Decoders, request: Request, limit: jax.Array, loop: Loop) -> Loop:
    memgen, session = decoders.memgen, loop.session
    previous, last = session.last_two
    keys = _keys(session, loop.step)
    free = loop.events < memgen.config.max_inference_events
    later = is_boundary(memgen.boundary[...], last, previous) & free
    asked = ~loop.done & jnp.where(loop.step == 0, True, later)
    invoke = jnp.zeros_like(asked)
    if not isinstance(request.policy, NeverInvoke):
        session, invoke = when(
            asked.any(),
            lambda carry: _decide(decoders, request, carry[0], asked, keys[1]),
            (session, invoke),
        )
    if memgen.config.weaver.latents and not isinstance(request.policy, NeverInvoke):
        carry = dataclasses.replace(loop, session=session), invoke
        loop, invoke = when(
            invoke.any(),
            lambda carry: _weave(decoders, request, carry[0], carry[1], keys[2]),
            carry,
        )
        session = loop.session
    logits = memgen.reasoner.unembed(session.reasoner.hidden)
    allowed = jnp.arange(logits.shape[-1]) < request.choices
    logits = jnp.where(allowed, logits, -jnp.inf)
    if request.temperature is None:
        chosen = logits.argmax(axis=-1).astype(jnp.int32)
    else:
        logits = logits / request.temperature
        chosen = jax.vmap(jax.random.categorical)(keys[0], logits).astype(jnp.int32)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)[:, 0]
    live = ~loop.done
    decision = jnp.where(asked, invoke.astype(jnp.int8), NOT_ASKED)
    response = loop.response
    column = lambda rows, value, none: jax.lax.dynamic_update_slice(  # noqa: E731
        rows, jnp.where(live, value, none).astype(rows.dtype)[:, None], (0, loop.step)
    )
    response = dataclasses.replace(
        response,
        tokens=column(response.tokens, chosen, 0),
        log_probs=column(response.log_probs, log_prob, 0.0),
        decisions=column(response.decisions, decision, NOT_ASKED),
        count=response.count + live,
    )
    session = session.append_tokens(memgen, chosen[:, None], live.astype(jnp.int32))
    ended = (chosen[:, None] == request.stop).any(axis=1) | (response.count >= limit)
    return Loop(
        loop.step + 1,
        loop.events + (invoke & (loop.step > 0)),
        loop.done | ended | jnp.isnan(log_prob),
        session,
        response,
    )


def _decide(decoders, request, session: Session, asked, keys) -> tuple[Session, jax.Array]:
    """Consult the policy in the rows that are asked."""
    memgen = decoders.memgen
    if not request.policy.learned:
        logits = jnp.zeros((asked.shape[0], 2))
    elif session.trigger is None:
        logits = memgen.checked_trigger()(session.reasoner.hidden)
    else:
        fetch, target = session.trigger_sees(memgen, decoders.trigger)
        reader = session.trigger.catch_up(decoders.trigger, fetch, target, asked)
        session = session.replace(trigger=reader)
        logits = memgen.checked_trigger()(reader.hidden)
    return session, asked & request.policy(logits, keys)


def _weave(decoders, request, loop: Loop, invoke, keys) -> tuple[Loop, jax.Array]:
    """Write memory into the rows that invoke; those whose memory is not kept do not."""
    memgen, session, response = decoders.memgen, loop.session, loop.response
    weaver = memgen.weaver
    batch, slots = invoke.shape[0], weaver.config.latents
    kind = jnp.broadcast_to(jnp.where(loop.step == 0, PROMPT, INFERENCE), (batch,))
    width = weaver.width(kind)
    if session.weaver is None:
        latents = weaver.fixed(kind)
    else:
        latents, session = _read_and_weave(decoders, request.retriever, session, kind, invoke)
    real = jnp.arange(slots) < width[:, None]
    latents = jnp.where(real[..., None], latents, 0)
    if request.keep_memory is not None:
        invoke &= request.keep_memory(latents, real, keys)
    session = session.append(memgen, latents, jnp.where(invoke, width, 0))
    event = jnp.where(loop.step == 0, 0, 1 + loop.events)
    once = invoke.astype(jnp.int32)
    point = jnp.broadcast_to(loop.step, (batch, 1))
    response = dataclasses.replace(
        response,
        latents=put(response.latents, latents[:, None], event, once),
        points=put(response.points, point, event, once),
    )
    return dataclasses.replace(loop, session=session, response=response), invoke


def _read_and_weave(
    decoders: Decoders, retriever: Any, session: Session, kind: jax.Array, invoke: jax.Array
) -> tuple[jax.Array, Session]:
    """Latents `[B, K, D]` of the rows that invoke, and the session with the weaver up to date."""
    memgen, weaver = decoders.memgen, decoders.memgen.weaver
    assert session.weaver is not None
    fetch, target = session.weaver_sees(memgen)
    reader = session.weaver.catch_up(decoders.weaver, fetch, target, invoke)
    snippets = None
    if retriever is not None:
        snippets = _retrieved(memgen, retriever, session, invoke)
    suffix, first = weaver.suffix(kind, snippets)
    slots = weaver.config.latents
    # The queries are read and forgotten: the cache without them lives on.
    hidden, _ = decoders.weaver.extend(reader.cache, suffix, jnp.where(invoke, first + slots, 0))
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
