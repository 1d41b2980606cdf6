"""Insertion of latents between tokens: plans, index maps and assembly, all of static shapes.

The reasoner's input sequence consists of the `L` embedded tokens of a row and the latents of the
row's `E` events: the `width[e]` latents of event `e` are inserted right before token `point[e]`.
Rows are padded on the right.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.checks import (
    check_config,
    check_lengths,
    check_woven_length,
    checked_ids,
    checked_mask,
    on_host,
)
from memgen.config import MemGenConfig
from memgen.delimiters import is_boundary
from memgen.placement import AnyArray, broadcast_beside
from memgen.short_repr import ShortRepr

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int, Key, UInt8

PROMPT, INFERENCE = 0, 1
HASH = 0x01000193  # prime base of polynomial hashes modulo 2**32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Plan(ShortRepr):
    """Where events insert latents: up to `E` events in each row, in increasing order of points.

    Attributes:
        point: `[B, E]` int32, index of the token right after each event's latents; -1 for an unused
            event.
        kind: `[B, E]` int32, kind of each event: `PROMPT` (before the response) or `INFERENCE` (at
            a boundary).
        width: `[B, E]` int32, number of latents of each event; 0 for an unused event.
    """

    point: jax.Array
    kind: jax.Array
    width: jax.Array

    @classmethod
    def of(cls, point: Int[Array, "B E"], kind: Int[Array, "B E"], config: MemGenConfig) -> Plan:
        """Make a plan in which each event has as many latents as the config sets for its kind.

        Args:
            point: Index of the token right after each event, int32; -1 for an unused event.
            kind: Kind of each event, `PROMPT` or `INFERENCE`, int32.
            config: Config of the MemGen that weaves.

        Raises:
            ValueError: The points of a row are not in increasing order (checked unless traced).
        """
        if not isinstance(point, Tracer):
            _check_ascending(on_host(point))
        weaver = config.weaver
        counts = np.array([weaver.inference_latents, weaver.prompt_latents], np.int32)
        width = jnp.where(kind == PROMPT, counts[1], counts[0])
        return cls(point, kind, jnp.where(point >= 0, width, 0))

    @property
    def start(self) -> Int[Array, "B E"]:
        """Index of each event's first latent in the input sequence; 0 for an unused event."""
        before = jnp.cumsum(self.width, axis=1) - self.width
        return jnp.where(self.point >= 0, self.point + before, 0)


def _check_ascending(point: np.ndarray) -> None:
    for row in point:
        used = row[row >= 0]
        if (np.diff(used) <= 0).any():
            raise ValueError(
                f"points {used.tolist()} of a plan do not ascend: sort them, one event for each"
            )


def check_plan(plan: Plan, tokens: Int[AnyArray, "B L"], slots: int) -> None:
    """Raise a ValueError unless a plan fits `tokens` and has at most `slots` latents per event.

    The number of rows is always checked, widths and points only if they are not traced.
    """
    rows, length = tokens.shape
    if not isinstance(plan, Plan):
        raise ValueError(
            f"a {type(plan).__name__} in place of a plan: give one of plan_insertions, or a Plan"
        )
    if plan.point.shape[0] != rows:
        raise ValueError(
            f"a plan of {plan.point.shape[0]} rows for tokens of {rows}: make one for these tokens"
        )
    if isinstance(plan.width, Tracer) or isinstance(plan.point, Tracer) or not plan.point.size:
        return
    # NumPy keeps a concrete plan concrete under a trace.
    widest, last = int(on_host(plan.width).max()), int(on_host(plan.point).max())
    if widest > slots:
        raise ValueError(
            f"a plan of {widest} latents for an event, the weaver writes at most {slots}: "
            "make it with this MemGen's config"
        )
    if last >= length:
        raise ValueError(
            f"a plan with point {last} for rows of {length} tokens: choose from 0 to {length - 1}"
        )
    _check_ascending(on_host(plan.point))


def check_replay(
    plan: Plan, tokens: jax.Array, length: Any, latents: Any, max_tokens: int, max_latents: int
) -> None:
    """Raise a ValueError unless texts, a plan and its latents fit each other and a session.

    Args:
        plan: Plan of the events, each of which needs latents.
        tokens: `[B, C]` token ids.
        length: `[B]`, number of real tokens in each row; not checked if traced.
        latents: `[B, E, K, D]` latents of each event.
        max_tokens: Maximum number of tokens of a row.
        max_latents: Number of latents of a row for which there is capacity beside `max_tokens`.
    """
    if tokens.shape[1] > max_tokens:
        raise ValueError(
            f"texts of {tokens.shape[1]} tokens do not fit into max_tokens={max_tokens}: raise it"
        )
    check_plan(plan, tokens, latents.shape[2])
    if latents.shape[1] < plan.point.shape[1]:
        raise ValueError(
            f"latents of {latents.shape[1]} events for a plan of {plan.point.shape[1]}: give those "
            "of each event of the plan"
        )
    if not any(isinstance(values, Tracer) for values in (length, plan.width)):
        longest = (on_host(length) + on_host(plan.width).sum(axis=1)).max()
        check_woven_length(int(longest), max_tokens + max_latents)


def token_index(plan: Plan, length: int) -> Int[Array, "B L"]:
    """Return each token's index in the input, `phi(i) = i + number of latents before token i`."""
    token = jnp.arange(length)
    before = (plan.point[:, :, None] >= 0) & (plan.point[:, :, None] <= token)
    return token + (plan.width[:, :, None] * before).sum(axis=1)


def predictor_index(plan: Plan, length: int) -> Int[Array, "B L"]:
    """Return the index of the hidden state that predicts each token, `phi(i) - 1` (`token_index`).

    The index is -1 for a row's first token if no event precedes the token.
    """
    return token_index(plan, length) - 1


def woven_length(plan: Plan, length: Int[Array, " B"]) -> Int[Array, " B"]:
    """Return the length of each input sequence: `length [B]` tokens and all latents."""
    return length + plan.width.sum(axis=1)


def woven_source(plan: Plan, length: int, slots: int) -> Int[Array, "B S"]:
    """Return which token or latent stands at each index of the input sequence.

    The sequence has `S = L + E*K` vectors, for `L` tokens (`length`), `E` events and `K` latent
    slots of an event (`slots`). A result `i < L` stands for token `i`, and `L + e*K + k` for latent
    `k` of event `e`.
    """
    events = plan.point.shape[1]
    index = jnp.arange(length + events * slots)
    offset = index - plan.start[:, :, None]
    within = (offset >= 0) & (offset < plan.width[:, :, None])
    before = jnp.clip(offset, 0, plan.width[:, :, None]).sum(axis=1)
    source = jnp.minimum(index - before, length - 1)
    of_event = length + jnp.arange(events)[:, None] * slots + offset
    return jnp.where(within.any(axis=1), jnp.where(within, of_event, 0).sum(axis=1), source)


def assemble(
    vectors: Float[Array, "B L D"], latents: Float[Array, "B E K D"], plan: Plan
) -> Float[Array, "B L+E*K D"]:
    """Insert latents between embedded tokens; the result is arbitrary after a row's end.

    Args:
        vectors: Embeddings of `L` tokens in each row.
        latents: Latents of `E` events in `K` slots each, of which the first `plan.width` are
            inserted.
        plan: Events of each row.
    """
    batch, length, dim = vectors.shape
    events, slots = latents.shape[1:3]
    source = woven_source(plan, length, slots)
    pool = jnp.concatenate(
        [vectors, latents.reshape(batch, events * slots, dim).astype(vectors.dtype)], axis=1
    )
    return jnp.take_along_axis(pool, source[..., None], axis=1)


def plan_insertions(
    tokens: Int[AnyArray, "B L"],
    loss_mask: Bool[AnyArray, "B L"],
    boundary: UInt8[AnyArray, " V"],
    config: MemGenConfig,
    key: Key[Array, ""] | None = None,
) -> Plan:
    """Plan the events of training texts: before the response, and at boundaries within it.

    Args:
        tokens: Token ids of prompt and response, padded on the right to `L` tokens.
        loss_mask: Mask that is True for tokens of the response. A boundary is used only between two
            tokens of the response.
        boundary: Flags of each token id, as `boundary_table` returns them.
        config: Config of the MemGen that weaves.
        key: PRNG key, required if `config.insertion` is "random". A row's events depend only on
            the key and the row's text, not on the batch or the padding, so equal texts have equal
            events.

    Raises:
        ValueError: The loss mask does not fit the tokens, the key for random insertion is missing,
            or a row does not have exactly one response (checked unless the mask is traced).
    """
    check_config(config, MemGenConfig)
    tokens = checked_ids(tokens)
    given, loss_mask = loss_mask, checked_mask(loss_mask, tokens)
    if not isinstance(given, Tracer):
        check_one_response(given)
    length = tokens.shape[1]
    index = jnp.arange(length)
    follows = jnp.pad(loss_mask, ((0, 0), (1, 0)))[:, :-1] & loss_mask
    begins = loss_mask & ~follows
    last = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    previous = jnp.pad(tokens, ((0, 0), (2, 0)))[:, :-2]
    chosen = follows & is_boundary(boundary, last, previous)
    if config.insertion == "random":
        if key is None:
            raise ValueError("insertion='random' draws boundaries: pass a key")
        draw = lambda key: jax.random.bernoulli(key, config.insertion_prob, (length,))  # noqa: E731
        chosen &= jax.vmap(draw)(_row_keys(key, tokens, loss_mask))
    first = jnp.where(begins, index, length).min(axis=1, keepdims=True)
    later = jnp.sort(jnp.where(chosen, index, length), axis=1)[:, : config.max_inference_events]
    missing = config.max_inference_events - later.shape[1]
    later = jnp.pad(later, ((0, 0), (0, missing)), constant_values=length)
    point = jnp.concatenate([first, later], axis=1).astype(jnp.int32)
    return _plan(jnp.where(point < length, point, -1), config)


def up_to_response_end(loss_mask: jax.Array) -> jax.Array:
    """Return a mask `[B, L]` of each row's tokens up to the last one in `loss_mask [B, L]`."""
    return jnp.cumsum(loss_mask[:, ::-1], axis=1)[:, ::-1] > 0


def _row_keys(key: jax.Array, tokens: jax.Array, loss_mask: jax.Array) -> jax.Array:
    """Derive a PRNG key for each row from its tokens up to the last token of the response."""
    text = up_to_response_end(loss_mask)
    weights = jnp.cumprod(jnp.full(tokens.shape[1:], HASH, jnp.uint32))
    hashes = jnp.where(text, (tokens + 1).astype(jnp.uint32) * weights, 0).sum(axis=1)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, hashes.astype(jnp.uint32))


def plan_from_decisions(
    decisions: Int[AnyArray, "B T"], prompt_length: Int[AnyArray, " B"], config: MemGenConfig
) -> Plan:
    """Make the plan of generated texts, each a prompt and its response, from recorded decisions.

    Args:
        decisions: Trigger's decision before each new token: 1 invoked, 0 skipped, -1 none
            (`Response.decisions`).
        prompt_length: Number of tokens in each prompt.
        config: Config of the MemGen that generated the texts.

    Raises:
        ValueError: The decisions are not `[B, T]`, or there is not one prompt length per row.
    """
    check_config(config, MemGenConfig)
    if jnp.ndim(decisions) != 2:
        raise ValueError(f"decisions of shape {jnp.shape(decisions)}: give [batch, new tokens]")
    decisions, prompt_length = jnp.asarray(decisions), jnp.asarray(prompt_length)
    check_lengths(prompt_length, len(decisions), "prompt_length")
    if not decisions.shape[1]:  # no token, so no event
        decisions = jnp.pad(decisions, ((0, 0), (0, 1)), constant_values=-1)
    step = jnp.arange(decisions.shape[1])
    later = jnp.sort(jnp.where(decisions[:, 1:] == 1, step[1:], step.size), axis=1)
    later = later[:, : config.max_inference_events]
    missing = config.max_inference_events - later.shape[1]
    later = jnp.pad(later, ((0, 0), (0, missing)), constant_values=step.size)
    first = jnp.where(decisions[:, :1] == 1, 0, step.size)
    invoked = jnp.concatenate([first, later], axis=1)
    point = jnp.where(invoked < step.size, invoked + prompt_length[:, None], -1)
    return _plan(point.astype(jnp.int32), config)


def _plan(point: jax.Array, config: MemGenConfig) -> Plan:
    kind = broadcast_beside(jnp.arange(point.shape[1]) > 0, point, 2)
    return Plan.of(point, kind, config)


def check_one_response(loss_mask: Any) -> None:
    """Raise a ValueError unless each row of `loss_mask [B, L]` has one contiguous run of True."""
    marks = np.asarray(loss_mask, bool)
    begins = marks & ~np.pad(marks, ((0, 0), (1, 0)))[:, :-1]
    for row, count in enumerate(begins.sum(axis=1)):
        if count != 1:
            raise ValueError(
                f"row {row} has {count} responses in its loss mask, a plan needs 1: "
                "give each response of a conversation a row of its own"
            )
