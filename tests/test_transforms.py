"""Fork layers under transformations of JAX that others use."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from thoughtbubbles import (
    Fork,
    PrefixRank,
    Streams,
    Threshold,
    TopK,
    merge,
    token_slots,
)
from thoughtbubbles.weights import Norm

X = jax.device_put(np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32))
POLICIES = {
    "rank": PrefixRank(2.0),
    "window": PrefixRank(1.5, window=3, burst=1, noise=1.0),
    "threshold": Threshold(),
    "top k": TopK(),
}


def merged(fork: Fork, x: jax.Array) -> jax.Array:
    return merge(fork(Streams.start(x)))


def fork_of(policy: Any = POLICIES["rank"], **options: Any) -> Fork:
    return Fork(8, policy, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("name", POLICIES)
def test_ranks_of_arrays_are_never_promoted(name: str):
    """In what a foreign decoder calls; only traced, nothing is compiled."""
    fork = fork_of(POLICIES[name], gate=1.0)
    lengths = jnp.array([3, 2], jnp.int32)

    def everything(fork, x, lengths):
        streams = fork(Streams.start(x, lengths), key=jax.random.key(0))
        found: list[Any] = [merge(streams), merge(streams, "rightmost"), streams.positions()]
        found += [streams.attention_bias(4), streams.attenuate(streams.x), streams.bubbles()]
        found.append(streams.bubble_of(lengths, 2))
        gradients = jax.grad(lambda x: merged(fork, x).sum())(x)
        found.append((gradients, fork(Streams.start(x), track=True)))
        if not fork.policy.causal:
            return found
        for width, fresh in ((5, False), (1, False), (5, True)):
            cache = fork.init_cache(2, 8)
            start = Streams.start(x[:, :width], first=cache.length)
            forked, slots, cache = fork.extend(start, cache, fresh=fresh)
            stored, new = jnp.zeros((2, slots.capacity)), jnp.zeros(forked.token.shape)
            found += [slots.write(stored, new), slots.visible(), slots.index()]
            found.append(token_slots(start, 8).visible())
        return found

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(everything, fork, X, lengths)


def test_many_models_at_once_are_each_alone():
    forks = [Fork(8, PrefixRank(1.5), rngs=nnx.Rngs(seed)) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *forks)
    together = jax.jit(jax.vmap(merged, in_axes=(0, None)))(stacked, X)
    alone = jax.jit(merged)
    for found, fork in zip(together, forks, strict=True):
        np.testing.assert_allclose(found, alone(fork, X), atol=1e-5)


def test_forward_mode_is_refused_by_jax_and_reverse_over_reverse_is_not():
    """Gradients of a fork are gathers of their own (`forking.take`), which have no tangents."""
    fork = fork_of()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(lambda x: merged(fork, x), (x,), (x,)))(X)
    double = jax.grad(lambda x: jax.grad(lambda x: (merged(fork, x) ** 2).sum())(x).sum())
    assert jax.eval_shape(double, X).shape == X.shape


def test_ahead_of_time_and_exported_it_computes_the_same():
    fork = fork_of()
    program = jax.jit(merged)
    expected = program(fork, X)
    np.testing.assert_array_equal(program.lower(fork, X).compile()(fork, X), expected)
    exported = jax.export.export(jax.jit(lambda x: merged(fork, x)))(X)
    np.testing.assert_allclose(exported.call(X), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["rank", "threshold"])
def test_a_state_can_be_donated(name: str):
    fork = fork_of(POLICIES[name])
    cache = fork.init_cache(2, 8)
    extend = jax.jit(Fork.extend, donate_argnums=2)
    _, _, cache = extend(fork, Streams.start(X, first=jnp.zeros_like(cache.length)), cache)
    assert cache.length.tolist() == [5, 5]


def test_fork_layers_are_scanned_from_streams_that_are_called_forked():
    """The carry of a scan keeps its structure, of which `forked` is a part."""
    forks = nnx.vmap(lambda rngs: Fork(8, TopK(streams=5), rngs=rngs))(nnx.Rngs(0).split(2))

    @jax.jit
    def compute(forks, x):
        start = Streams.start(x).replace(forked=True)
        scanned, _ = jax.lax.scan(lambda streams, fork: (fork(streams), None), start, forks)
        alone = Streams.start(x)
        for index in range(2):
            alone = jax.tree.map(lambda leaf, index=index: leaf[index], forks)(alone)
        return merge(scanned), merge(alone)

    scanned, alone = compute(forks, X)
    np.testing.assert_allclose(scanned, alone, atol=1e-6)


def test_derivatives_of_a_norm_are_those_of_its_formula():
    """First and second ones, and forward mode, though the norm has a derivative of its own."""
    norm = Norm(8)
    x = X[0, 0] + 3

    def formula(x):
        return (x - x.mean()) / jnp.sqrt(((x - x.mean()) ** 2).mean() + norm.eps)

    def everything(of):
        weighed = lambda x: (jnp.sin(jnp.arange(8)) * of(x)).sum()  # noqa: E731
        return jax.jvp(of, (x,), (X[1, 0],)), jax.grad(weighed)(x), jax.hessian(weighed)(x)

    found, expected = jax.jit(lambda: (everything(norm), everything(formula)))()
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
