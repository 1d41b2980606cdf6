"""Functions of single positions in chunks: values, derivatives, and the number of products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memgen import token_log_probs
from memgen.by_chunk import by_chunk

B, L, D, V, C = 2, 11, 4, 60, 4
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (B, L, D))
TABLE = jax.random.normal(KEYS[1], (V, D))
TARGETS = jax.random.randint(KEYS[2], (B, L), 0, V)
WEIGHTS = jax.random.normal(KEYS[3], (B, L))
MASK = jnp.arange(L) < jnp.array([[7], [3]])  # the last chunk is masked out


class Head:
    """A decoder's head, which is no pytree."""

    def __init__(self, table: jax.Array):
        self.table = table

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return jnp.einsum("bcd,vd->bcv", hidden, self.table)


HEAD: Any = Head(TABLE)


def total(hidden, table, targets=TARGETS):
    head: Any = Head(table)
    found = token_log_probs(head, hidden, targets, MASK, chunk=C)
    return (WEIGHTS * found).sum()


def plain_total(hidden, table):
    log_probs = jax.nn.log_softmax(hidden @ table.T)
    picked = jnp.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]
    return jnp.where(MASK, WEIGHTS * picked, 0).sum()


def close(found, expected):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=2e-5, atol=2e-6), found, expected
    )


@pytest.mark.parametrize("moved", [(0,), (1,), (0, 1)], ids=["hidden", "head", "both"])
def test_gradients_are_those_of_the_definition(moved):
    expected = jax.value_and_grad(plain_total, moved)(HIDDEN, TABLE)
    close(jax.value_and_grad(total, moved)(HIDDEN, TABLE), expected)
    close(jax.jit(jax.value_and_grad(total, moved))(HIDDEN, TABLE), expected)
    close(jax.value_and_grad(jax.jit(total), moved)(HIDDEN, TABLE), expected)


def test_a_frozen_head_is_multiplied_twice():
    """Once for the logits and once for the gradient of the hidden states."""

    def products(moved: int | tuple[int, ...]) -> int:
        program = jax.jit(jax.value_and_grad(total, moved)).lower(HIDDEN, TABLE).compile()
        return str(program.as_text()).count(" dot(")

    assert (products(0), products(1), products((0, 1))) == (2, 3, 4)


def test_other_transforms():
    with_table = functools.partial(total, table=TABLE)
    plain = functools.partial(plain_total, table=TABLE)
    change = jnp.cos(HIDDEN)
    close(jax.jvp(with_table, (HIDDEN,), (change,)), jax.jvp(plain, (HIDDEN,), (change,)))
    both = (HIDDEN, TABLE), (change, jnp.sin(TABLE))
    close(jax.jvp(total, *both), jax.jvp(plain_total, *both))
    second = lambda of: jax.jvp(jax.grad(of), (HIDDEN,), (change,))  # noqa: E731
    close(second(with_table), second(plain))
    several = jnp.stack([HIDDEN, change])
    close(jax.vmap(jax.grad(with_table))(several), jax.vmap(jax.grad(plain))(several))


def test_no_target_is_no_gradient_and_masked_chunks_are_skipped():
    wrong = TARGETS.at[0, 2].set(-1)
    found, slope = jax.value_and_grad(total)(HIDDEN, TABLE, wrong)
    assert (
        np.isnan(found) and not slope[0, 2].any() and np.isfinite(slope).all() and slope[0, 1].any()
    )
    hidden = HIDDEN.at[:, 8:].set(jnp.nan)
    close(jax.value_and_grad(total)(hidden, TABLE), jax.value_and_grad(total)(HIDDEN, TABLE))


def test_several_results_each_with_its_derivative():
    def results(table, hidden, other, targets):
        log_p, log_q = (jax.nn.log_softmax(h @ table.T) for h in (hidden, other))
        picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return {"kl": (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1), "picked": picked}

    def weighted(of, hidden, other, table):
        found = of(functools.partial(results, table), hidden, other)
        return (WEIGHTS * (found["kl"] + 2 * found["picked"] ** 2)).sum()

    chunks = functools.partial(weighted, lambda of, *values: by_chunk(of, values, TARGETS, MASK, C))
    whole = functools.partial(
        weighted,
        lambda of, *values: jax.tree.map(lambda x: jnp.where(MASK, x, 0), of(*values, TARGETS)),
    )
    other = HIDDEN[::-1]
    for moved in (0, 1, (0, 1), (0, 2)):
        found = jax.value_and_grad(chunks, moved)(HIDDEN, other, TABLE)
        close(found, jax.value_and_grad(whole, moved)(HIDDEN, other, TABLE))


def test_integers_that_are_traced_too():
    """An int8 table, and the number of valid ids as an array."""
    small = jnp.round(40 * TABLE).astype(jnp.int8)

    def with_small(hidden, small, size):
        head: Any = Head(small.astype(jnp.float32) / 40)
        found = token_log_probs(head, hidden, TARGETS, MASK, valid_vocab_size=size, chunk=C)
        return (WEIGHTS * found).sum()

    expected = jax.grad(plain_total)(HIDDEN, small.astype(jnp.float32) / 40)
    for of in (jax.jit(with_small), jax.checkpoint(with_small)):
        close(jax.grad(of)(HIDDEN, small, jnp.int32(V)), expected)


def test_a_mask_that_is_placed_otherwise_than_the_rows():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    split = NamedSharding(mesh, PartitionSpec("data"))

    def slopes(hidden, targets, weights):
        mask = jnp.arange(L) < jnp.full((len(hidden), 1), 5)

        def loss(hidden):
            return (weights * token_log_probs(HEAD, hidden, targets, mask, chunk=C)).sum()

        return jax.grad(loss)(hidden)

    rows = HIDDEN, TARGETS, WEIGHTS
    expected = slopes(*rows)
    with jax.set_mesh(mesh):
        close(jax.jit(slopes)(*jax.device_put(rows, split)), expected)
        each = jax.shard_map(slopes, in_specs=split.spec, out_specs=split.spec)
        close(jax.jit(each)(*jax.device_put(rows, split)), expected)


def test_a_trained_head_that_varies_as_the_rows_do():
    """Devices skip other chunks; the gradient of the head is summed over devices once."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")

    def share(hidden, table, targets, mask, weights):
        head: Any = Head(jax.lax.pcast(table, "data", to="varying"))
        found = token_log_probs(head, hidden, targets, mask, chunk=C)
        return jax.lax.psum((weights * found).sum(), "data")

    specs = rows, PartitionSpec(), rows, rows, rows
    each = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    found = jax.jit(jax.grad(each, (0, 1)))(HIDDEN, TABLE, TARGETS, MASK, WEIGHTS)
    close(found, jax.grad(plain_total, (0, 1))(HIDDEN, TABLE))
