"""Events of generation: the trigger decides which rows weave, the weaver writes their latents."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from memgen.insertion import INFERENCE, PROMPT
from memgen.model import MemGen
from memgen.placement import broadcast_beside, embed, placed_beside, row_shards
from memgen.request import Request
from memgen.response import Response
from memgen.row_group import RowGroup
from memgen.session import Session, put, take
from memgen.short_repr import ShortRepr, short_repr
from memgen.trigger import NeverInvoke
from memgen.weaver import Snippets

PATIENCE = 8
"""Maximum number of steps for which a row waits before it weaves."""


@dataclasses.dataclass(frozen=True)
class WeaverBatchSize:
    """Number of rows of one forward pass of the weaver: `shards * rows`, which weave together.

    Attributes:
        shards: Number of shards of the batch, which weave in parallel.
        rows: Number of rows of each shard in a batch. With 1, no row waits for other rows.
    """

    shards: int = 1
    rows: int = 1

    def check(self, batch: int) -> None:
        """Raise a ValueError unless `batch` rows of a session can be split so."""
        whole = self.shards * self.rows >= batch  # then the rows weave in one pass, in place
        if min(self.shards, self.rows) < 1 or (batch % self.shards and not whole):
            raise ValueError(
                f"{self} of a batch of {batch} rows: give a number of shards that divides it, and "
                "one row or more"
            )

    def due(self, waiting: jax.Array, live: jax.Array) -> jax.Array:
        """Return a bool scalar: whether a batch of the waiting rows weaves in this step.

        Args:
            waiting: `[B]` int32, number of steps that each row has waited (`Loop.waiting`).
            live: `[B]` bool, True for unfinished rows.
        """
        number = (waiting > 0).sum()
        if self.rows == 1:
            return number > 0
        enough = (number >= self.shards * self.rows) | (number == live.sum())
        return (number > 0) & (enough | (waiting > PATIENCE).any())


def weaver_batch_size_for(session: Session) -> WeaverBatchSize:
    """Choose how many rows of a session weave in one forward pass of the weaver.

    On an accelerator, an eighth of each shard's rows weave together, because a forward pass over a
    few rows takes as long as over one row. On a CPU the pass takes longer, so one row of each shard
    weaves at a time. A batch that is traced with `AxisType.Auto` mesh axes counts as one shard.
    """
    count = session.count
    if isinstance(count, Tracer):
        shards, platform = row_shards(count), jax.default_backend()
    else:
        count = jnp.asarray(count)
        (shard,) = count.sharding.shard_shape(count.shape)
        shards, platform = count.shape[0] // shard, next(iter(count.devices())).platform
    rows = 1 if platform == "cpu" else max(1, count.shape[0] // shards // 8)
    return WeaverBatchSize(shards, rows)


@dataclasses.dataclass(frozen=True)
class Decoders:
    """Decoders in their fastest form for decoding (`for_decoding`), prepared once before the loop.

    Attributes:
        memgen: Model whose reasoner is in the form for decoding.
        weaver: The weaver's `DecoderBackbone` with the weaver's adapter, in the form for decoding;
            None if events have no latents.
        trigger: The trigger's `DecoderBackbone` with the trigger's adapter, in the form for
            decoding; None without a learned trigger, or if the trigger's input is the reasoner's
            hidden state.
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
        events: `[B]` int32, number of events in each row so far, not counting the event before the
            first token.
        waiting: `[B]` int32, number of steps that each row has waited to weave since the row
            invoked the weaver, the step of the invocation included; 0 for rows that do not wait.
        done: `[B]` bool, True for finished rows.
        session: Session so far.
        response: Response so far, whose `count` is the index of each row's next token.
    """

    events: jax.Array
    waiting: jax.Array
    done: jax.Array
    session: Session
    response: Response


class EventInputs(NamedTuple):
    """Inputs besides the session with which the weaver writes the latents of one event per row.

    Attributes:
        kind: `[B]` int32, kind of each row's event, `PROMPT` or `INFERENCE`.
        keys: `[B]` PRNG keys, from which a filter `Request.keep_memory` may draw which events it
            drops at random.
        snippets: Retrieved text for the weaver's context, or None without a retriever.
    """

    kind: jax.Array
    keys: jax.Array
    snippets: Snippets | None

    __repr__ = short_repr


def memory_event(
    decoders: Decoders,
    request: Request,
    loop: Loop,
    boundary: jax.Array,
    begins: jax.Array,
    weaver_batch_size: WeaverBatchSize,
) -> Loop:
    """Let the trigger policy decide in rows at a boundary, then weave in waiting rows, if due.

    Args:
        decoders: Decoders of the loop.
        request: Options of the response.
        loop: State of the loop before this step's decisions.
        boundary: `[B]` bool, True for rows in which the policy decides in this step.
        begins: `[B]` bool, True for rows before the first token of a response.
        weaver_batch_size: Number of rows that weave together.

    Returns:
        State of the loop after this step's events. Rows that still wait generate no token.
    """
    memgen, at, kept = decoders.memgen, loop.response.count, jnp.zeros_like(boundary)
    _, decision_keys, event_keys = loop.session.step_keys(at)
    decided = boundary
    if not isinstance(request.policy, NeverInvoke):

        def decide(state: tuple[Session, jax.Array]) -> tuple[Session, jax.Array]:
            return _decide(decoders, request, state[0], boundary, decision_keys)

        def weave(state: tuple[Loop, jax.Array]) -> tuple[Loop, jax.Array]:
            return _weave(decoders, request, state[0], begins, event_keys, weaver_batch_size)

        session, kept = apply_if(boundary.any(), decide, (loop.session, kept))
        loop = dataclasses.replace(loop, session=session)
        if memgen.config.weaver.latents:
            waiting = loop.waiting + (kept | (loop.waiting > 0))
            loop = dataclasses.replace(loop, waiting=waiting)
            # All rows begin in the same step, so waiting before the first token gains no rows.
            due = (begins & (waiting > 0)).any() | weaver_batch_size.due(waiting, ~loop.done)
            loop, kept = apply_if(due, weave, (loop, jnp.zeros_like(boundary)))
            decided = (boundary | (waiting > 0)) & (loop.waiting == 0)
    column = broadcast_beside(at, boundary, 1)
    decisions = put(loop.response.decisions, kept[:, None], column, decided.astype(jnp.int32))
    response = dataclasses.replace(loop.response, decisions=decisions)
    return dataclasses.replace(loop, events=loop.events + (kept & ~begins), response=response)


def _decide(
    decoders: Decoders, request: Request, session: Session, boundary: jax.Array, keys: jax.Array
) -> tuple[Session, jax.Array]:
    """Return the session with the trigger's cache up to date, and `[B]` bool, True if invoked."""
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
    begins: jax.Array,
    keys: jax.Array,
    weaver_batch_size: WeaverBatchSize,
) -> tuple[Loop, jax.Array]:
    """Weave in rows that wait; return the loop and a mask `[B]` of rows with new latents.

    The mask is False for rows whose latents `keep_memory` dropped. Groups of rows weave one after
    the other, so that the work grows with the number of rows that weave. If more than half of the
    batch weaves, or a row weaves before its first token, all rows are computed in one forward pass.
    """
    memgen, response = decoders.memgen, loop.response
    waiting, live = loop.waiting, ~loop.done
    # Weaving does not change the trigger's cache, so the loop over groups does not carry it.
    trigger, session = loop.session.trigger, loop.session.replace(trigger=None)
    snippets = None
    if request.retriever is not None:
        snippets = _retrieve(memgen, request.retriever, session, waiting > 0)
    inputs = EventInputs(jnp.where(begins, PROMPT, INFERENCE), keys, snippets)
    vector = jax.eval_shape(embed, memgen.reasoner, session.tokens[:, :1])
    slots = memgen.config.weaver.latents
    latents = jnp.zeros((waiting.shape[0], slots, vector.shape[-1]), vector.dtype)
    state = _Weaving(waiting, session, placed_beside(latents, waiting), jnp.zeros_like(begins))

    def weave_all(state: _Weaving) -> _Weaving:
        weaves = state.waiting > 0
        made, new, keep = _weave_rows(decoders, request, state.session, weaves, inputs)
        new = new.astype(state.latents.dtype)
        return _Weaving(jnp.zeros_like(state.waiting), made, new, keep)

    in_groups = weaver_batch_size.shards * weaver_batch_size.rows < len(waiting)
    if in_groups and memgen.config.max_inference_events:
        many = 2 * (waiting > 0).sum() > len(waiting)
        state = apply_if(many | (begins & (waiting > 0)).any(), weave_all, state)
        weave_group = functools.partial(_weave_group, decoders, request, inputs, weaver_batch_size)
        due = lambda state: weaver_batch_size.due(state.waiting, live)  # noqa: E731
        state = jax.lax.while_loop(due, weave_group, state)
    else:
        state = weave_all(state)
    once, at = state.kept.astype(jnp.int32), broadcast_beside(response.count, waiting, 1)[:, None]
    event = jnp.where(begins, 0, 1 + loop.events)
    response = dataclasses.replace(
        response,
        latents=put(response.latents, state.latents[:, None], event, once),
        points=put(response.points, at, event, once),
    )
    session = state.session.replace(trigger=trigger)
    loop = dataclasses.replace(loop, waiting=state.waiting, session=session, response=response)
    return loop, state.kept


class _Weaving(NamedTuple):
    """State of the loop over groups: waiting steps of rows left to weave, and results so far."""

    waiting: jax.Array
    session: Session
    latents: jax.Array
    kept: jax.Array


def _weave_group(
    decoders: Decoders,
    request: Request,
    inputs: EventInputs,
    weaver_batch_size: WeaverBatchSize,
    state: _Weaving,
) -> _Weaving:
    """Apply `_weave_rows` to a group of the rows left to weave, those that waited longest."""
    axes = state.session.batch_axes(decoders.memgen.reasoner, decoders.weaver, None)
    rows = RowGroup.next(state.waiting, weaver_batch_size.shards, weaver_batch_size.rows)
    weaves = rows.take(state.waiting) > 0
    session, new, keep = _weave_rows(
        decoders, request, rows.take(state.session, axes), weaves, rows.take(inputs)
    )
    old = rows.take(state.latents)
    return _Weaving(
        rows.put(state.waiting, jnp.zeros_like(weaves, state.waiting.dtype)),
        rows.put(state.session, session, axes),
        rows.put(state.latents, jnp.where(keep[:, None, None], new.astype(old.dtype), old)),
        rows.put(state.kept, rows.take(state.kept) | keep),
    )


def _weave_rows(
    decoders: Decoders,
    request: Request,
    session: Session,
    weaves: jax.Array,
    inputs: EventInputs,
) -> tuple[Session, jax.Array, jax.Array]:
    """Weave in `R` rows; return the session, the latents `[R, K, D]`, and a mask of kept rows.

    Args:
        decoders: Decoders of the loop.
        request: Options of the response.
        session: Session of the `R` rows.
        weaves: `[R]` bool, True for rows that weave.
        inputs: Inputs of the events of the `R` rows.
    """
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
    """Return the latents `[R, K, D]`, and the session with the weaver's cache up to date."""
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
        # The session keeps the cache without snippets and queries.
        hidden, _ = decoders.weaver.extend(state.cache, suffix, jnp.where(weaves, first + slots, 0))
    latents = weaver.memory(take(hidden, first[:, None] + jnp.arange(slots)))
    return latents, session.replace(weaver=state)


def _retrieve(memgen: MemGen, retriever: Any, session: Session, invoked: jax.Array) -> Snippets:
    """Query the `Retriever` on the host for the rows in which `invoked [B]` is True."""
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
    """Return `update(state)` if the scalar predicate holds, else the pytree `state` at no cost.

    This is `lax.cond` written as a `while_loop` of at most one iteration, because XLA updates a
    loop's carry in place, but may copy the caches that are operands of a conditional.
    """
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), update(carry[1])),
        (predicate, state),
    )[1]
