"""Assertions for the tests of your own fork policies and architectures.

Assertions about a policy apply two fork layers with random parameters to random rows; nothing is
trained, and no model is built. Assertions about an architecture (`assert_decoder_*`) take a model.
An `AssertionError` says which requirement is violated.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles.architecture import Architecture
from thoughtbubbles.fork_cache import ForkCache
from thoughtbubbles.layers import Fork
from thoughtbubbles.policy import CausalPolicy, Policy
from thoughtbubbles.streams import Streams

WIDTH = 8
PART = 3


def assert_budget(policy: Policy, *, rows: int = 4, num_tokens: int = 12, seed: int = 0) -> None:
    """Assert that originals are kept and that no row has more streams than the policy's capacity.

    Args:
        policy: Policy under test.
        rows: Number of random rows.
        num_tokens: Number of tokens per row.
        seed: Seed of the rows and the parameters.
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
    """Assert that the streams of a token depend on no later token, bit for bit.

    For each token but the first, the row is changed from this token on, and cut before it.

    Args:
        policy: Policy under test.
        rows: Number of random rows.
        num_tokens: Number of tokens per row.
        seed: Seed of the rows and the parameters.
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
    """Assert that a row forked in parts with a cache has the streams of the row forked at once.

    Log-scores may differ by float rounding (1e-5).

    Args:
        policy: Policy under test, with `init_state` and `keep_next` (`CausalPolicy`).
        rows: Number of random rows, each of which is split at other tokens.
        num_tokens: Number of tokens per row.
        seed: Seed of the rows and the parameters.

    Raises:
        ValueError: The policy has no `init_state` and `keep_next`.
    """
    if not isinstance(policy, CausalPolicy):
        raise ValueError(f"{policy} has no init_state() and keep_next(): it can't be cached")
    x = _rows(rows, num_tokens, seed)
    [(_, whole), _] = _forked(policy, x, seed)
    expected = _by_token(whole)
    fork = _layer(policy, seed)
    cache = fork.init_cache(rows, num_tokens)
    found: list[list[Any]] = [[] for _ in range(rows)]
    for start in range(0, num_tokens, PART):
        # Rows are split at different tokens: row r ends each part r % PART tokens later than row 0.
        ends = np.minimum(start + PART + np.arange(rows) % PART, num_tokens)
        starts = np.where(start == 0, 0, np.minimum(start + np.arange(rows) % PART, num_tokens))
        part = np.zeros((rows, 2 * PART, WIDTH), np.float32)
        for row, (begin, end) in enumerate(zip(starts, ends, strict=True)):
            part[row, : end - begin] = x[row, begin:end]
        length = jnp.asarray(ends - starts, jnp.int32)
        streams, cache = _extended(fork, jnp.asarray(part), length, cache)
        for row, tokens in enumerate(_by_token(streams)):
            found[row] += tokens[: int(length[row])]
    for row in range(rows):
        for token, (mine, theirs) in enumerate(zip(found[row], expected[row], strict=True)):
            near = len(mine) == len(theirs) and np.allclose(mine, theirs, atol=1e-5)
            assert near, (
                f"row {row}, token {token}: forked in parts its streams score {mine}, at once "
                f"{theirs}: keep_next over parts must give what keep gives over the row"
            )


def assert_decoder_causal(
    model: Architecture, *, rows: int = 4, num_tokens: int = 12, seed: int = 0
) -> None:
    """Assert that the logits at a position depend on no later token or padding, bit for bit.

    For each token but the first, the tokens from there on are replaced by other tokens, and by
    padding.

    Args:
        model: Model under test, with random parameters.
        rows: Number of random rows.
        num_tokens: Number of tokens per row.
        seed: Seed of the rows.
    """
    tokens, other = _token_rows(model, rows, num_tokens, seed)
    whole = np.full(rows, num_tokens, np.int32)
    before = np.asarray(_decoder_logits(model, tokens, whole))
    for first in range(1, num_tokens):
        changed = np.where(np.arange(num_tokens) < first, tokens, other)
        for what, length in (("other tokens", whole), ("padding", np.full_like(whole, first))):
            after = np.asarray(_decoder_logits(model, changed, length))
            assert (before[:, :first] == after[:, :first]).all(), (
                f"logits before position {first} change with {what} from there on: a position may "
                "depend on tokens up to it alone"
            )


def assert_decoder_cached_is_parallel(
    model: Architecture, *, rows: int = 4, num_tokens: int = 12, seed: int = 0
) -> None:
    """Assert that decoding in parts with a cache gives the logits of one parallel forward pass.

    The tolerance is 1e-5, or 1e-5 times the largest magnitude of the logits if it is above 1.

    Args:
        model: Model under test, with random parameters.
        rows: Number of random rows, each of which is split at other tokens.
        num_tokens: Number of tokens per row.
        seed: Seed of the rows.
    """
    tokens, _ = _token_rows(model, rows, num_tokens, seed)
    expected = np.asarray(_decoder_logits(model, tokens, np.full(rows, num_tokens, np.int32)))
    found, cache = np.zeros_like(expected), model.init_cache(rows, num_tokens)
    done = np.zeros(rows, np.int32)
    for turn in range(3 * num_tokens):
        # In each turn, 0 to PART tokens of a row are decoded.
        length = np.minimum((turn + np.arange(rows)) % (PART + 1), num_tokens - done)
        part = np.zeros((rows, PART), np.int32)
        for row, (start, count) in enumerate(zip(done, length, strict=True)):
            part[row, :count] = tokens[row, start : start + count]
        logits, cache = _advanced(model, cache, part, length.astype(np.int32))
        for row, (start, count) in enumerate(zip(done, length, strict=True)):
            found[row, start : start + count] = np.asarray(logits)[row, :count]
        done += length.astype(np.int32)
        if (done == num_tokens).all():
            break
    gap = np.abs(found - expected).max()
    assert gap <= 1e-5 * max(1.0, np.abs(expected).max()), (
        f"logits of rows read in parts differ by {gap:.2g} from those of rows read at once: extend "
        "must continue what hidden_states computes, and leave rows of length 0 as they are"
    )


def _token_rows(model: Architecture, rows: int, num_tokens: int, seed: int):
    drawn = np.random.default_rng(seed).integers(model.vocab_size, size=(2, rows, num_tokens))
    return drawn.astype(np.int32)


@jax.jit
def _decoder_logits(model: Architecture, tokens: jax.Array, length: jax.Array) -> jax.Array:
    return model.logits(model.run(tokens, length))


@jax.jit
def _advanced(
    model: Architecture, cache: Any, tokens: jax.Array, length: jax.Array
) -> tuple[jax.Array, Any]:
    output, cache = model.advance(cache, tokens, length)
    return model.logits(output), cache


def _rows(rows: int, num_tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, num_tokens])
    return rng.normal(size=(rows, num_tokens, WIDTH)).astype(np.float32)


def _layer(policy: Policy, seed: int) -> Fork:
    """Make a fork layer whose scores differ much between tokens."""
    fork = Fork(WIDTH, policy, rngs=nnx.Rngs(seed))
    scores = np.random.default_rng(seed).normal(size=(WIDTH, 2))
    fork.score[...] = jnp.asarray(scores, jnp.float32)
    if fork.threshold is not None:
        fork.threshold[...] = jnp.full((), 0.3, jnp.float32)
    return fork


def _forked(
    policy: Policy, x: np.ndarray, seed: int, length: int | None = None
) -> list[tuple[int, Streams]]:
    """Return index and streams of each of two fork layers, for `length` tokens of each row."""
    real = np.full(len(x), x.shape[1] if length is None else length, np.int32)
    return list(enumerate(_twice(_layer(policy, seed), _layer(policy, seed + 1), x, real)))


@jax.jit
def _kept(lower: Fork, upper: Fork, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the policy's keep masks at two fork layers, before candidates get slots."""
    streams = Streams.start(x)
    first = lower.policy.keep(lower.candidates(streams))
    return first, upper.policy.keep(upper.candidates(lower(streams)))


@jax.jit
def _twice(lower: Fork, upper: Fork, x: jax.Array, length: jax.Array) -> tuple[Streams, Streams]:
    streams = lower(Streams.start(x, length))
    return streams, upper(streams)


@jax.jit
def _extended(
    fork: Fork, x: jax.Array, length: jax.Array, cache: ForkCache
) -> tuple[Streams, ForkCache]:
    """Fork the next tokens; return their streams, and the state after them."""
    streams, _, cache = fork.extend(Streams.start(x, length, first=cache.length), cache)
    return streams, cache


def _by_token(streams: Streams) -> list[list[tuple[float, ...]]]:
    """Return the log-scores of each token's live streams, for each row and token."""
    token, alive = np.asarray(streams.token), np.asarray(streams.alive)
    score = np.asarray(streams.log_score)
    count = cast(int, streams.num_tokens)
    return [
        [tuple(score[row][alive[row] & (token[row] == t)].tolist()) for t in range(count)]
        for row in range(len(token))
    ]
