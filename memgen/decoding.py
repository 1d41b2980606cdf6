"""Generation interleaved with weaving: one compiled loop, in which rows weave at different steps.

A step decides which rows weave, appends their latents to the reasoner's cache, and then samples a
token in each row. Weaving costs nothing in a step in which no row weaves. In large batches on an
accelerator, a row may wait a few steps, sampling no token, so that several rows weave together.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.checks import check_rows, checked_ids, checked_lengths, on_host
from memgen.delimiters import is_boundary
from memgen.events import Decoders, Loop, WeaverBatchSize, memory_event, weaver_batch_size_for
from memgen.insertion import Plan, assemble, check_replay, woven_length
from memgen.model import MemGen, check_memgen
from memgen.placement import AnyArray, embed, placed_beside
from memgen.request import (
    KeepMemory,
    Request,
    bucket,
    make_request,
    pad_prompts,
    row_keys,
    with_prefills,
)
from memgen.response import Response
from memgen.session import Session, check_capacity, check_session, put
from memgen.trigger import AlwaysInvoke, NeverInvoke, TriggerPolicy

Progress = Callable[[int, int], None]
LONGEST_WHOLE = 4096
"""Maximum length, in tokens with padding, of prompts that are prefilled in one forward pass."""
BLOCK, SMALLEST_BLOCK = 512, 32
"""Numbers of tokens of a block in which longer prompts are prefilled: about `BLOCK` over all rows
together, but at least `SMALLEST_BLOCK` of each row."""


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
    prefills: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> Response:
    """Generate a response with latent memory to each prompt.

    A row's text and events do not depend on the other rows of the batch. A program is compiled for
    each combination of three lengths, each rounded up to a power of two of at least 16: the longest
    prompt, the longest prefill, and the longest prefill plus `max_new_tokens`. The same program
    serves whichever rows weave at whichever steps.

    Args:
        memgen: Model that generates.
        prompts: Token ids of each prompt, at least one.
        max_new_tokens: Maximum number of tokens to generate after each prompt and its prefill.
        policy: Trigger policy, which decides at each boundary whether to weave.
        temperature: Temperature of sampling; 0 takes the most probable token.
        seed: Seed of the sampling noise. A row's PRNG key is derived from the seed, the row's
            prompt, and the number of equal prompts before the row in the batch.
        stop: Token ids that end a row. The id that ended a row is one of the row's new tokens.
        valid_vocab_size: Number of ids that may be sampled: ids from `valid_vocab_size` on are
            excluded. By default all ids may be sampled.
        keep_memory: Filter of events (`Request.keep_memory`); None keeps the latents of every
            event.
        retriever: Retriever that is queried at each event (`memgen.retrieval.Retriever`), or None.
        prefills: Token ids with which each response begins; a row's list may be empty. The loop
            takes a prefill token per step in place of a sampled token, and weaves memory before and
            among prefill tokens as usual. A prefill token that `valid_vocab_size` excludes has the
            log-probability -inf. By default the model begins each response itself.
        progress: Function that `begin` calls after each block of a prefill in blocks (see `begin`).

    Returns:
        Response with the new tokens and the events of each row.

    Raises:
        ValueError: An argument is out of its range (see `make_request`), a prompt is empty, a
            prompt or a prefill holds an id outside of the vocabulary, there is not one prefill for
            each prompt, or a row's logits are NaN.
    """
    request = make_request(
        memgen, max_new_tokens, policy, temperature, stop, valid_vocab_size, keep_memory, retriever
    )
    tokens, length = pad_prompts(prompts, memgen.reasoner.vocab_size)
    longest = 0
    if prefills is not None:
        request = with_prefills(request, prefills, len(prompts), memgen.reasoner.vocab_size)
        longest = max(map(len, prefills))
    capacity = bucket(longest + max_new_tokens)
    keys = row_keys(seed, prompts)
    max_tokens = tokens.shape[1] + capacity
    session = begin(memgen, tokens, length, keys, max_tokens, request=request, progress=progress)
    response, _ = respond(memgen, session, request, capacity)
    bad = np.isnan(np.asarray(response.log_probs)).any(axis=1)
    if bad.any():
        raise ValueError(
            f"prompt {int(bad.argmax())}: the logits are NaN: check the parameters, or compute in "
            "float32"
        )
    return response


def begin(
    memgen: MemGen,
    tokens: AnyArray,
    length: AnyArray,
    keys: jax.Array,
    max_tokens: int,
    max_responses: int = 1,
    *,
    request: Request | None = None,
    progress: Progress | None = None,
) -> Session:
    """Prefill a new session with prompts.

    Prompts of more than `LONGEST_WHOLE` tokens (padding included) are prefilled in blocks, so that
    no `[tokens, tokens]` array of an entire row is materialized. Under `jit`, prompts of any length
    are prefilled in one forward pass.

    Args:
        memgen: Model that will respond.
        tokens: `[B, C]` int32 token ids of prompts, padded on the right to `C`.
        length: `[B]` int32, number of real tokens in each prompt.
        keys: `[B]` PRNG keys, one for each row.
        max_tokens: Maximum number of tokens per row, responses included.
        max_responses: Maximum number of responses for whose latents the session has capacity.
        request: Request whose retriever determines the capacity for retrieved tokens; None for a
            session without retrieval.
        progress: Function that is called after each block, if prompts are prefilled in blocks, with
            the numbers of prefilled tokens and of all tokens of the longest prompt.

    Raises:
        ValueError: The prompts are longer than `max_tokens`, or `tokens`, `length` or `keys` has a
            wrong shape, dtype or value.
    """
    check_memgen(memgen)
    tokens = checked_ids(tokens)
    length = checked_lengths(length, tokens)
    check_rows(tokens.shape[0], keys=keys)
    if tokens.shape[1] > max_tokens:
        raise ValueError(
            f"prompts of {tokens.shape[1]} tokens do not fit into max_tokens={max_tokens}: raise it"
        )
    retriever = request.retriever if request else None
    snippet_capacity = retriever.max_snippet_tokens if retriever else 0
    sizes = max_tokens, max_responses, snippet_capacity
    traced = isinstance(tokens, Tracer) or isinstance(length, Tracer)
    if tokens.shape[1] <= LONGEST_WHOLE or traced:
        return _begin(memgen, tokens, length, keys, *sizes)
    longest, session = int(on_host(length).max()), None
    size = max(BLOCK >> (len(tokens) - 1).bit_length(), SMALLEST_BLOCK)
    for first in range(0, max(longest, 1), size):
        block = tokens[:, first : first + size]
        block = jnp.pad(block, ((0, 0), (0, size - block.shape[1])))
        count = jnp.clip(length - first, 0, size)
        if session is None:
            session = _begin(memgen, block, count, keys, *sizes)
        else:
            session = _observe(memgen, session, block, count)
        if progress is not None:
            jax.block_until_ready(session.count)
            progress(min(first + size, longest), longest)
    assert session is not None
    return session


@functools.partial(jax.jit, static_argnames=("max_tokens", "max_responses", "snippet_capacity"))
def _begin(memgen, tokens, length, keys, max_tokens, max_responses, snippet_capacity) -> Session:
    session = Session.start(
        memgen, placed_beside(keys, tokens), max_tokens, max_responses, snippet_capacity
    )
    return session.append_tokens(memgen, tokens, length, fresh=True)


def replay(
    memgen: MemGen,
    tokens: AnyArray,
    length: AnyArray,
    plan: Plan,
    latents: jax.Array,
    keys: jax.Array,
    max_tokens: int,
    max_responses: int = 1,
) -> Session:
    """Prefill a new session with texts and with latents that were woven into the texts before.

    Only the reasoner's cache is filled here. The caches of weaver and trigger are filled when the
    session first uses them, as in generation.

    Args:
        memgen: Model that wove the latents.
        tokens: `[B, C]` int32 token ids of texts, padded on the right to `C`.
        length: `[B]` int32, number of real tokens in each text.
        plan: Plan of `E` events, whose points are the positions of the latents in the texts.
        latents: `[B, E, K, D]` latents of each event, up to `K` (see `Response.latents`).
        keys: `[B]` PRNG keys, one for each row.
        max_tokens: Maximum number of tokens per row, texts included.
        max_responses: Maximum number of responses for whose latents the session has capacity,
            including the responses that are part of the texts.

    Raises:
        ValueError: The texts are longer than `max_tokens`, there is no capacity for the latents
            (under `jit` the row becomes NaN instead), or the arguments do not fit each other.
    """
    check_memgen(memgen)
    tokens = checked_ids(tokens)
    length = checked_lengths(length, tokens)
    check_rows(tokens.shape[0], keys=keys, latents=latents)
    most = max_responses * memgen.config.max_latents
    check_replay(plan, tokens, length, latents, max_tokens, most)
    return _replay(memgen, tokens, length, plan, latents, keys, max_tokens, max_responses)


@functools.partial(jax.jit, static_argnames=("max_tokens", "max_responses"))
def _replay(memgen, tokens, length, plan, latents, keys, max_tokens, max_responses) -> Session:
    session = Session.start(memgen, placed_beside(keys, tokens), max_tokens, max_responses)
    inputs_embeds = assemble(embed(memgen.reasoner, tokens), latents, plan)
    inputs_embeds = inputs_embeds[:, : session.capacity]  # later vectors are beyond every row's end
    session = session.append(memgen, inputs_embeds, woven_length(plan, length), fresh=True)
    zeros = jnp.zeros_like(length)
    return session.replace(tokens=put(session.tokens, tokens, zeros, length), count=length)


def observe(memgen: MemGen, session: Session, tokens: AnyArray, length: AnyArray) -> Session:
    """Append tokens from outside, such as an environment's answer, to the rows.

    Args:
        memgen: Model of the session.
        session: Session to extend; its buffers are donated, so only the result may be used.
        tokens: `[B, C]` int32 token ids to append, padded on the right.
        length: `[B]` int32, number of real tokens to append to each row.

    Raises:
        ValueError: A row would exceed the session's capacity (under `jit` the row becomes NaN
            instead), or `tokens` or `length` has a wrong shape, dtype or value.
    """
    check_session(memgen, session)
    tokens = checked_ids(tokens)
    check_rows(session.tokens.shape[0], tokens=tokens)
    length = checked_lengths(length, tokens)
    check_capacity(session, length)
    return _observe(memgen, session, tokens, length)


@functools.partial(jax.jit, donate_argnames="session")
def _observe(memgen, session, tokens, length) -> Session:
    return session.append_tokens(memgen, tokens, length)


def respond(
    memgen: MemGen,
    session: Session,
    request: Request,
    capacity: int,
    weaver_batch_size: WeaverBatchSize | None = None,
) -> tuple[Response, Session]:
    """Generate a response in each row, with latent memory where the policy invokes the weaver.

    The rows keep all tokens and latents, including the latents of earlier responses. To drop the
    latents, begin a new session with the text alone.

    Args:
        memgen: Model that responds.
        session: Session to extend; its buffers are donated, so only the result may be used.
        request: Options of the response (`make_request`).
        capacity: Number of new tokens that the response's arrays hold (static); a smaller
            `request.max_new_tokens` ends the response earlier. 0 leaves all rows unchanged.
        weaver_batch_size: Number of rows that weave in one forward pass of the weaver, which
            decides the cost alone (static); by default `weaver_batch_size_for` chooses.

    Returns:
        The response, and the extended session.

    Raises:
        ValueError: A row would exceed the session's capacity (under `jit` the row becomes NaN
            instead), the request's prefill has another number of rows, the session lacks the
            capacity for the snippets of the request's retriever, or the session's rows cannot be
            split so.
    """
    check_session(memgen, session)
    weaver_batch_size = weaver_batch_size or weaver_batch_size_for(session)
    weaver_batch_size.check(session.tokens.shape[0])
    if not isinstance(request, Request):
        raise ValueError(f"a {type(request).__name__} in place of a request: give make_request()")
    if request.prefill is not None:
        check_rows(session.tokens.shape[0], prefill=request.prefill)
    if request.retriever is not None:
        most = request.retriever.max_snippet_tokens
        if most > session.snippet_capacity:
            raise ValueError(
                f"the retriever gives up to {most} tokens, the session holds "
                f"{session.snippet_capacity} of an event: begin(..., request=request)"
            )
    if not isinstance(request.max_new_tokens, Tracer):
        new = np.minimum(capacity, on_host(request.max_new_tokens))
        check_capacity(session, new, _most_latents(memgen, request))
    return _respond(memgen, session, request, capacity, weaver_batch_size)


def _most_latents(memgen: MemGen, request: Request) -> Any:
    """Return the maximum number of latents that a response adds to a row, a scalar or `[B]`."""
    config = memgen.config
    if isinstance(request.policy, NeverInvoke):
        return 0
    if request.events is None or isinstance(request.events, Tracer):
        return config.max_latents
    events = on_host(request.events)
    left = (config.max_inference_events - events) * config.weaver.inference_latents
    return np.where(events < 0, config.max_latents, left)


@functools.partial(
    jax.jit, static_argnames=("capacity", "weaver_batch_size"), donate_argnames="session"
)
def _respond(memgen, session, request, capacity, weaver_batch_size) -> tuple[Response, Session]:
    decoders = Decoders.prepare(memgen)
    limit = jnp.minimum(request.max_new_tokens, capacity)

    def unfinished(loop: Loop) -> jax.Array:
        return ~loop.done.all()

    def step(loop: Loop) -> Loop:
        return _step(decoders, request, limit, loop, weaver_batch_size)

    loop = jax.lax.while_loop(unfinished, step, _start(decoders, limit, request, session, capacity))
    return loop.response, loop.session


def _start(
    decoders: Decoders, limit: jax.Array, request: Request, session: Session, capacity: int
) -> Loop:
    """Return the state of the loop before its first step."""
    memgen, batch = decoders.memgen, session.count.shape[0]
    vector = jax.eval_shape(embed, memgen.reasoner, session.tokens[:, :1])
    before = jnp.zeros_like(session.count) if request.events is None else request.events
    done = (limit < 1) | (session.count < 1)
    return Loop(
        events=jnp.maximum(before, 0),
        waiting=jnp.zeros_like(session.count),
        done=done,
        session=session.replace(responses=session.responses + ~done),
        response=placed_beside(Response.empty(memgen, batch, capacity, vector), session.count),
    )


def _step(
    decoders: Decoders,
    request: Request,
    limit: jax.Array,
    loop: Loop,
    weaver_batch_size: WeaverBatchSize,
) -> Loop:
    """Weave in rows that invoke the weaver, then add a token to each row that does not wait."""
    memgen, most = decoders.memgen, decoders.memgen.config.max_inference_events
    at, session = loop.response.count, loop.session
    begins = at == 0
    if request.events is not None:
        begins &= request.events < 0
    boundary = begins
    if most:
        previous, last = session.last_two
        within = is_boundary(memgen.boundary[...], last, previous) & (loop.events < most)
        boundary = begins | within
    boundary &= ~loop.done & (loop.waiting == 0)
    loop = memory_event(decoders, request, loop, boundary, begins, weaver_batch_size)
    session, live = loop.session, ~loop.done & (loop.waiting == 0)
    given = _given(request, at)
    chosen, log_prob = _sample(memgen, request, session, session.step_keys(at)[0], given)
    response = _record_token(loop.response, chosen, log_prob, live)
    session = session.append_tokens(memgen, chosen[:, None], live.astype(jnp.int32))
    stopped = (chosen[:, None] == request.stop).any(axis=1)
    if given is not None:
        stopped &= given < 0
    ended = stopped | (response.count >= limit) | jnp.isnan(log_prob)
    done = loop.done | (live & ended)
    return dataclasses.replace(loop, done=done, session=session, response=response)


def _given(request: Request, at: jax.Array) -> jax.Array | None:
    """Return token `at [B]` of each row's prefill, -1 after the end; None without a prefill."""
    if request.prefill is None:
        return None
    take = lambda row, index: row.at[index].get(mode="fill", fill_value=-1)  # noqa: E731
    return jax.vmap(take)(placed_beside(request.prefill, at), at)


def _sample(
    memgen: MemGen, request: Request, session: Session, keys: jax.Array, given: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the next token of each row, `[B]` int32, and the token's log-probability, `[B]`."""
    logits = memgen.reasoner.unembed(session.reasoner.hidden)
    allowed = jnp.arange(logits.shape[-1]) < request.valid_vocab_size
    logits = jnp.where(allowed, logits, -jnp.inf)
    if request.temperature is None:
        chosen = logits.argmax(axis=-1).astype(jnp.int32)
    else:
        logits = logits / request.temperature
        inside = logits if request.top_p is None else nucleus(logits, request.top_p)
        chosen = jax.vmap(jax.random.categorical)(keys, inside).astype(jnp.int32)
    if given is not None:
        chosen = jnp.where(given >= 0, given, chosen)
    log_probs = jax.nn.log_softmax(logits)
    return chosen, jnp.take_along_axis(log_probs, chosen[:, None], axis=1)[:, 0]


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Set logits `[B, V]` to -inf outside of the nucleus (Holtzman et al. 2020, arXiv 1904.09751).

    The nucleus is the smallest set of most probable tokens whose probabilities sum to `top_p` or
    more. Tokens that tie with the least probable of these tokens belong to the nucleus too.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(descending, axis=-1)
    more_probable = jnp.cumsum(probability, axis=-1) - probability
    inside = (more_probable < top_p).at[..., 0].set(True)  # the first one despite rounding
    least = jnp.where(inside, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _record_token(
    response: Response, chosen: jax.Array, log_prob: jax.Array, live: jax.Array
) -> Response:
    """Return the response with one more token in the rows where `live [B]` is True."""
    once = live.astype(jnp.int32)
    return dataclasses.replace(
        response,
        tokens=put(response.tokens, chosen[:, None], response.count, once),
        log_probs=put(response.log_probs, log_prob[:, None], response.count, once),
        count=response.count + once,
    )
