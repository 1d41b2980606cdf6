"""Where latents stand: plans, index maps and streams, as pure functions of static shape.

A row of `L` tokens with `E` events becomes a stream: event `e` writes `width[e]` latents right
before token `point[e]`, and everything after moves along. Rows are padded on the right.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.config import MemGenConfig
from memgen.delimiters import is_boundary

PROMPT, INFERENCE = 0, 1
HASH = 0x01000193  # a prime: polynomial hashes modulo 2**32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Events of each row, in ascending order.

    Attributes:
        point: `[B, E]` int32, the token that the latents stand before; -1 for an unused event.
        kind: `[B, E]` int32, `PROMPT` or `INFERENCE`.
        width: `[B, E]` int32 latents, 0 for an unused event.
    """

    point: jax.Array
    kind: jax.Array
    width: jax.Array

    @classmethod
    def of(cls, point: jax.Array, kind: jax.Array, config: MemGenConfig) -> "Plan":
        """A plan whose widths are the config's.

        Raises:
            ValueError: the points of a row do not ascend (checked unless traced).
        """
        if not isinstance(point, Tracer):
            _check_ascending(np.asarray(point))
        weaver = config.weaver
        width = jnp.where(kind == PROMPT, weaver.prompt_latents, weaver.inference_latents)
        return cls(point, kind, jnp.where(point >= 0, width, 0))

    @property
    def start(self) -> jax.Array:
        """`[B, E]` int32: the stream place of each event's first latent; 0 where unused."""
        before = jnp.cumsum(self.width, axis=1) - self.width
        return jnp.where(self.point >= 0, self.point + before, 0)


def _check_ascending(point: np.ndarray) -> None:
    for row in point:
        used = row[row >= 0]
        if (np.diff(used) <= 0).any():
            raise ValueError(
                f"points {used.tolist()} of a plan must ascend: sort them, one event for each"
            )


def check_plan(plan: Plan, tokens: jax.Array, slots: int) -> None:
    """Raise a ValueError for a plan that is not one of `tokens [B, L]` and of `slots` latents.

    Rows are always checked, widths and points unless traced.
    """
    rows, length = tokens.shape
    if plan.point.shape[0] != rows:
        raise ValueError(
            f"a plan of {plan.point.shape[0]} rows for tokens of {rows}: make one for these tokens"
        )
    if isinstance(plan.width, Tracer) or isinstance(plan.point, Tracer) or not plan.point.size:
        return
    # By NumPy: under a trace a concrete plan must stay concrete.
    widest, last = int(np.asarray(plan.width).max()), int(np.asarray(plan.point).max())
    if widest > slots:
        raise ValueError(
            f"a plan of {widest} latents for an event, the weaver writes at most {slots}: "
            "make it with this MemGen's config"
        )
    if last >= length:
        raise ValueError(f"a plan with point {last} for rows of {length} tokens: count from 0")
    _check_ascending(np.asarray(plan.point))


def stream_index(plan: Plan, length: int) -> jax.Array:
    """Where each token stands in the stream, `[B, L]` int32: `phi(i) = i + latents before i`."""
    token = jnp.arange(length)
    before = (plan.point[:, :, None] >= 0) & (plan.point[:, :, None] <= token)
    return token + (plan.width[:, :, None] * before).sum(axis=1)


def predictor_index(plan: Plan, length: int) -> jax.Array:
    """The stream place whose output predicts each token, `[B, L]`: `phi(i) - 1` (-1 if none)."""
    return stream_index(plan, length) - 1


def stream_length(plan: Plan, length: jax.Array) -> jax.Array:
    """Vectors of each row's stream, `[B]`, for rows of `length [B]` tokens."""
    return length + plan.width.sum(axis=1)


def assemble(vectors: jax.Array, latents: jax.Array, plan: Plan) -> jax.Array:
    """The stream `[B, L + E K, D]`; what stands behind its end is some copy, never to be read.

    Args:
        vectors: `[B, L, D]`, embedded tokens.
        latents: `[B, E, K, D]`; of each event the first `width` are taken.
    """
    batch, length, dim = vectors.shape
    events, slots = latents.shape[1:3]
    place = jnp.arange(length + events * slots)
    offset = place - plan.start[:, :, None]
    within = (offset >= 0) & (offset < plan.width[:, :, None])
    before = jnp.clip(offset, 0, plan.width[:, :, None]).sum(axis=1)
    source = jnp.minimum(place - before, length - 1)
    of_event = length + jnp.arange(events)[:, None] * slots + offset
    source = jnp.where(within.any(axis=1), jnp.where(within, of_event, 0).sum(axis=1), source)
    pool = jnp.concatenate(
        [vectors, latents.reshape(batch, events * slots, dim).astype(vectors.dtype)], axis=1
    )
    return jnp.take_along_axis(pool, source[..., None], axis=1)


def plan_insertions(
    tokens: jax.Array,
    loss_mask: jax.Array,
    boundary: jax.Array,
    config: MemGenConfig,
    key: jax.Array | None = None,
) -> Plan:
    """Events of training texts: one before the response, then at boundaries within it.

    A boundary counts where it is supervised on both sides.

    Args:
        tokens: `[B, L]` int32.
        supervised: `[B, L]` bool, the response's tokens.
        boundary: `[V]` table of `memgen.delimiters`.
        key: for `insertion="random"`; a row's places are drawn by it and the row's own tokens,
            whatever batch or padding it comes with (JAX's default kind of keys). Equal texts have
            equal places.

    Raises:
        ValueError: no key for random places; a row without a response, or with several (checked
            unless traced).
    """
    if not isinstance(loss_mask, Tracer):
        check_one_response(loss_mask)
    length = tokens.shape[1]
    place = jnp.arange(length)
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
    first = jnp.where(begins, place, length).min(axis=1, keepdims=True)
    later = jnp.sort(jnp.where(chosen, place, length), axis=1)[:, : config.max_inference_events]
    missing = config.max_inference_events - later.shape[1]
    later = jnp.pad(later, ((0, 0), (0, missing)), constant_values=length)
    point = jnp.concatenate([first, later], axis=1).astype(jnp.int32)
    return _plan(jnp.where(point < length, point, -1), config)


def _row_keys(key: jax.Array, tokens: jax.Array, loss_mask: jax.Array) -> jax.Array:
    """A key for each row, of its tokens up to the last one that is supervised."""
    text = jnp.cumsum(loss_mask[:, ::-1], axis=1)[:, ::-1] > 0
    weights = jnp.cumprod(jnp.full(tokens.shape[1:], HASH, jnp.uint32))
    hashes = jnp.where(text, (tokens + 1).astype(jnp.uint32) * weights, 0).sum(axis=1)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, hashes.astype(jnp.uint32))


def plan_from_decisions(
    decisions: jax.Array, prompt_length: jax.Array, config: MemGenConfig
) -> Plan:
    """The plan of texts that were generated, over rows of prompt and response.

    Args:
        decisions: `[B, T]` int8 of each new token (`memgen.Response`).
        prompt_length: `[B]` int32.
    """
    place = jnp.arange(decisions.shape[1])
    asked = jnp.sort(jnp.where(decisions[:, 1:] == 1, place[1:], place.size), axis=1)
    asked = asked[:, : config.max_inference_events]
    missing = config.max_inference_events - asked.shape[1]
    asked = jnp.pad(asked, ((0, 0), (0, missing)), constant_values=place.size)
    first = jnp.where(decisions[:, :1] == 1, 0, place.size)
    chosen = jnp.concatenate([first, asked], axis=1)
    point = jnp.where(chosen < place.size, chosen + prompt_length[:, None], -1)
    return _plan(point.astype(jnp.int32), config)


def _plan(point: jax.Array, config: MemGenConfig) -> Plan:
    kind = jnp.broadcast_to(jnp.arange(point.shape[1]) > 0, point.shape).astype(jnp.int32)
    return Plan.of(point, kind, config)


def check_one_response(loss_mask: Any) -> None:
    """Raise a ValueError for a row `[B, L]` whose supervised tokens are not one unbroken run."""
    marks = np.asarray(loss_mask, bool)
    begins = marks & ~np.pad(marks, ((0, 0), (1, 0)))[:, :-1]
    for row, count in enumerate(begins.sum(axis=1)):
        if count != 1:
            raise ValueError(
                f"row {row} has {count} supervised responses, a plan takes 1: "
                "give each response of a conversation a row of its own"
            )
