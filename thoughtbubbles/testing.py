"""What every fork policy promises, as functions for the tests of your own policy.

Each builds two fork layers with random weights around the policy and looks at random rows; nothing
is trained, and no model is built. They raise an `AssertionError` that says which promise is broken.
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles.layers import Fork
from thoughtbubbles.policy import CausalPolicy, Policy
from thoughtbubbles.streams import Streams

WIDTH = 8
PART = 3


def assert_budget(policy: Policy, *, rows: int = 4, num_tokens: int = 12, seed: int = 0) -> None:
    """Originals live, and no row has more streams than the policy's capacity.

    Args:
        policy: Policy under test.
        rows: Number of random rows.
        num_tokens: Tokens in a row.
        seed: Seed of rows and weights.
    """
    x = _rows(rows, num_tokens, seed)
    capacity = policy.capacity(num_tokens)
    for fork, kept in enumerate(_kept(_layer(policy, seed), _layer(policy, seed + 1), x)):
        most = int(np.asarray(kept).sum(axis=1).max())
        assert most <= capacity, (
            f"fork layer {fork}: keep() keeps {most} candidates of a row, capacity({num_tokens}) "
            f"is {capacity}: what is too much would be cut from the right"
        )
    for fork, streams in _forked(policy, x, seed):
        originals = np.asarray(streams.original & streams.alive).sum(axis=1)
        assert (originals == num_tokens).all(), (
            f"fork layer {fork}: {num_tokens - originals.min()} originals are lost: keep every "
            "candidate that is forced and alive"
        )


def assert_causal(policy: Policy, *, rows: int = 8, num_tokens: int = 12, seed: int = 0) -> None:
    """Streams of a token depend on tokens up to it alone, bit for bit.

    Args:
        policy: Policy under test.
        rows: Number of random rows.
        num_tokens: Tokens in a row; each in turn is the first that changes.
        seed: Seed of rows and weights.
    """
    x = _rows(rows, num_tokens, seed)
    other = _rows(rows, num_tokens, seed + 1)
    before = [_by_token(streams) for _, streams in _forked(policy, x, seed)]
    for first in range(1, num_tokens):
        changed = np.where(np.arange(num_tokens)[:, None] < first, x, other)
        for what, given in (("has other tokens", changed), ("has no tokens", None)):
            after = _forked(
                policy, x if given is None else given, seed, first if given is None else None
            )
            for fork, streams in after:
                theirs = _by_token(streams)
                for row in range(rows):
                    assert before[fork][row][:first] == theirs[row][:first], (
                        f"fork layer {fork}: what becomes of a token depends on later tokens: row "
                        f"{row} changed before token {first}, from which on it {what}"
                    )


def assert_cached_is_parallel(
    policy: Policy, *, rows: int = 4, num_tokens: int = 12, seed: int = 0
) -> None:
    """Rows forked in parts have the streams of rows forked at once, scores to 1e-5.

    Args:
        policy: Policy under test, with `memory` and `keep_next` (`CausalPolicy`).
        rows: Number of random rows.
        num_tokens: Tokens in a row, cut into parts at other places in each row.
        seed: Seed of rows and weights.

    Raises:
        ValueError: The policy has no `memory` and `keep_next`.
    """
    if not isinstance(policy, CausalPolicy):
        raise ValueError(f"{policy} has no memory() and keep_next(): it can't be cached")
    x = _rows(rows, num_tokens, seed)
    [(_, whole), _] = _forked(policy, x, seed)
    expected = _by_token(whole)
    fork, memory = _layer(policy, seed), policy.memory(rows, 2 * num_tokens)
    found: list[list[Any]] = [[] for _ in range(rows)]
    for start in range(0, num_tokens, PART):
        # Rows are cut at different places: row r has its first tokens alone, r of them.
        ends = np.minimum(start + PART + np.arange(rows) % PART, num_tokens)
        starts = np.where(start == 0, 0, np.minimum(start + np.arange(rows) % PART, num_tokens))
        part = np.zeros((rows, 2 * PART, WIDTH), np.float32)
        for row, (begin, end) in enumerate(zip(starts, ends, strict=True)):
            part[row, : end - begin] = x[row, begin:end]
        length = jnp.asarray(ends - starts, jnp.int32)
        state = jnp.asarray(starts, jnp.int32), memory
        streams, memory = _extended(fork, jnp.asarray(part), length, state, num_tokens)
        for row, tokens in enumerate(_by_token(streams)):
            found[row] += tokens[: int(length[row])]
    for row in range(rows):
        for token, (mine, theirs) in enumerate(zip(found[row], expected[row], strict=True)):
            near = len(mine) == len(theirs) and np.allclose(mine, theirs, atol=1e-5)
            assert near, (
                f"row {row}, token {token}: forked in parts its streams score {mine}, at once "
                f"{theirs}: keep_next over parts must give what keep gives over the row"
            )


def _rows(rows: int, num_tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, num_tokens])
    return rng.normal(size=(rows, num_tokens, WIDTH)).astype(np.float32)


def _layer(policy: Policy, seed: int) -> Fork:
    """A fork layer whose scores differ much between tokens."""
    fork = Fork(WIDTH, policy, rngs=nnx.Rngs(seed))
    scores = np.random.default_rng(seed).normal(size=(WIDTH, 2))
    fork.score[...] = jnp.asarray(scores, jnp.float32)
    if fork.threshold is not None:
        fork.threshold[...] = jnp.full((), 0.3, jnp.float32)
    return fork


def _forked(
    policy: Policy, x: np.ndarray, seed: int, length: int | None = None
) -> list[tuple[int, Streams]]:
    """Streams after each of two fork layers, of the first `length` tokens of rows."""
    real = np.full(len(x), x.shape[1] if length is None else length, np.int32)
    return list(enumerate(_twice(_layer(policy, seed), _layer(policy, seed + 1), x, real)))


@jax.jit
def _kept(lower: Fork, upper: Fork, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the policy keeps at each of two fork layers, before slots are filled."""
    streams = Streams.start(x)
    first = lower.policy.keep(lower._candidates(streams))
    return first, upper.policy.keep(upper._candidates(lower(streams)))


@jax.jit
def _twice(lower: Fork, upper: Fork, x: jax.Array, length: jax.Array) -> tuple[Streams, Streams]:
    streams = lower(Streams.start(x, length))
    return streams, upper(streams)


@partial(jax.jit, static_argnums=4)
def _extended(
    fork: Fork, x: jax.Array, length: jax.Array, state: tuple[jax.Array, Any], num_tokens: int
) -> tuple[Streams, Any]:
    """Streams of the next tokens, `length` of `x`; `state` is the tokens so far and a memory."""
    first, memory = state
    return fork.extend(Streams.start(x, length, first=first), memory, num_tokens)


def _by_token(streams: Streams) -> list[list[tuple[float, ...]]]:
    """For each row and token the log-scores of its live streams, in order."""
    token, alive = np.asarray(streams.token), np.asarray(streams.alive)
    score = np.asarray(streams.log_score)
    count = cast(int, streams.num_tokens)
    return [
        [tuple(score[row][alive[row] & (token[row] == t)].tolist()) for t in range(count)]
        for row in range(len(token))
    ]
