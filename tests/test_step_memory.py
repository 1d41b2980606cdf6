"""What a training step does not hold: logits of all tokens, and weights of slots by slots."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import SMALL, quick_model

from thoughtbubbles import PrefixRank, Streams, Thoughtbubbles, attention, forking, head
from thoughtbubbles.head import head_logits
from thoughtbubbles.placement import product_beside
from thoughtbubbles.recompute import once_known
from thoughtbubbles.sampling import log_prob_of

V, B, T = 86, 2, 70
CONFIG = dataclasses.replace(
    SMALL,
    vocab_size=V,
    num_layers=1,
    fork_layers=(0,),
    policy=PrefixRank(1.5),
    num_kv_heads=1,
    tied_head=False,
)
KINDS = {
    "plain": dataclasses.replace(CONFIG, fork_layers=()),
    "residual": dataclasses.replace(CONFIG, tied_head=True),
    "probability": dataclasses.replace(CONFIG, merge="probability"),
}
LIMITS = {
    (head, "LARGEST_LOGITS"): 4 * B * T * 20,
    (head, "SMALLEST_CHUNK"): 16,
    (attention, "LARGEST_PROBABILITIES"): 0,
    (attention, "LARGEST_TILE"): 5000,
    (attention, "SMALLEST_TILE"): 1,
    (forking, "LARGEST_MEMBERSHIP"): 0,
}


def compiled_loss(config: Any, rows: Any) -> Any:
    """Loss and gradients as a program of its own, which limits of tests may have changed."""
    program = jax.jit(jax.value_and_grad(lambda model, rows: model.loss(rows)[0], allow_int=True))
    return program.lower(quick_model(config), rows).compile()


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_gradients_of_results_are_computed_once():
    """Neither transposed, for the gradient of a kernel, nor anew for each layer before."""
    config = dataclasses.replace(KINDS["plain"], num_layers=6, embed_dim=16, mlp_dim=32)
    program = compiled_loss(config, np.zeros((B, T + 1), np.int32)).as_text()
    fused = re.findall(r"^%fused\S* \(.*?^}", program, re.MULTILINE | re.DOTALL)
    added = [len(re.findall(r"\[(?:2,70|140),16\]\S* add\(", each)) for each in fused]
    assert 0 < max(added) < 12, "53 when each sum began anew"
    transposed = r"\[(?:16|32|86),(?:140|2,70)\]\S* (?:multiply|add|copy|transpose)\("
    assert not re.findall(transposed, program), "36 where products are of three axes"


def test_gradients_of_adapted_results_are_computed_once():
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 70, 16), (16, 4), (4, 32))]

    def loss(x, first, last):
        return jnp.tanh(product_beside(product_beside(x, first), last)).sum()

    program: Any = jax.jit(jax.grad(loss, (1, 2))).lower(*arrays).compile()
    assert not re.findall(r"\[32,(?:140|2,70)\]", program.as_text())


def test_gradients_of_logits_are_computed_once():
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 70, 16), (32, 16))]
    loss = lambda x, table: jnp.tanh(head_logits(x, table)).sum()  # noqa: E731
    program: Any = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    assert not re.findall(r"\[32,(?:140|2,70)\]", program.as_text()), "7 with three axes"


# "residual": its parts below; `python -m pytest -m experiment tests/test_step_memory.py`.
@pytest.mark.parametrize(
    "kind", [pytest.param("residual", marks=pytest.mark.experiment), "probability"]
)
def test_large_steps_hold_no_logits_and_give_the_same(monkeypatch, kind):
    config, rows = KINDS[kind], np.random.default_rng(0).integers(0, V, (B, T + 1), np.int32)
    rows[1, 40:] = -1
    large = {f"[{B},{size},{V}]" for size in (T, config.slots(T)[-1])}

    def logits(program: Any) -> set[str]:
        return large & set(re.findall(r"f32(\[[\d,]*\])", program.as_text()))

    small = compiled_loss(config, rows)
    assert logits(small), "the search finds logits where they are held"
    for (module, name), limit in LIMITS.items():
        monkeypatch.setattr(module, name, limit)
    program = compiled_loss(config, rows)
    assert not logits(program)
    args = quick_model(config), rows
    close(program(*args), small(*args), 3e-6)


def test_chunks_of_the_vocabulary_change_nothing():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 10, (2, 3)))
    weights = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    for vocab_axis, shape in ((0, (10, 8)), (1, (8, 10))):
        table = jnp.asarray(rng.normal(size=shape), jnp.float32)

        def total(hidden, table, chunks, vocab_axis=vocab_axis):
            found = head.head_log_prob(hidden, table, targets, vocab_axis=vocab_axis, chunks=chunks)
            return (weights * found).sum(), found

        both = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
        logits = np.asarray(hidden, np.float64) @ np.asarray(table if vocab_axis else table.T)
        picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
        expected = picked - np.log(np.exp(logits).sum(-1))
        for chunks in (2, 6):  # the second pads the table
            value, grads = both(hidden, table, chunks)
            close(grads, both(hidden, table, 1)[1], 1e-6)
            np.testing.assert_allclose(value[1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "vocab_size"), [("uint8", 256), ("int8", 300), ("uint16", 2**16)]
)
def test_targets_may_be_small_integers(dtype: str, vocab_size: int):
    logits, ids = jnp.zeros((3, vocab_size)), jnp.array([0, 5, 127], dtype)
    np.testing.assert_allclose(log_prob_of(logits, ids), -np.log(vocab_size), rtol=1e-6)


@pytest.mark.parametrize("chunks", [1, 2, 6])
def test_a_target_outside_the_vocabulary_is_nan_in_any_chunk(chunks: int):
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((6, 8), (10, 8)))
    targets = jnp.array([9, 10, 11, 99, -1, 0])  # padding of the last chunk has ids from 10 on
    found = head.head_log_prob(hidden, table, targets, chunks=chunks)
    assert np.isnan(found).tolist() == [False, True, True, True, True, False]
    gradient = jax.grad(lambda x: head.head_log_prob(x, table, targets, chunks=chunks).sum())
    assert (np.abs(gradient(hidden)).sum(axis=1) > 0).tolist() == [True, *[False] * 4, True]


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_a_summed_loss_has_the_gradient_of_its_definition(vocab_axis):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 10, (2, 5))).at[1, 3:].set(-1)
    table = jnp.asarray(rng.normal(size=(8, 10) if vocab_axis else (10, 8)), jnp.float32)

    def total(hidden, table, parts):
        found = head.head_loss(hidden, table, targets, vocab_axis=vocab_axis, parts=parts)
        return 3 * found[0], found[1]

    def by_targets(hidden, table):
        found = head.head_log_prob(hidden, table, abs(targets), vocab_axis=vocab_axis, chunks=1)
        nats = jnp.where(targets < 0, 0, -found)
        return 3 * nats.sum(), nats

    expected = jax.value_and_grad(by_targets, (0, 1), has_aux=True)(hidden, table)
    both = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
    for parts in (1, 2, 5):  # the second pads the rows
        close(both(hidden, table, parts), expected)
        close(total(hidden, table, parts), expected[0])


def test_a_large_loss_computes_its_logits_once(monkeypatch):
    rows = np.random.default_rng(0).integers(0, V, (B, T + 1), np.int32)
    rows[1, 40:] = -1
    model = quick_model(KINDS["plain"])

    def by_token(model, rows):
        nats, _ = model.token_losses(rows)
        return nats.sum(), nats

    def summed(model, rows):
        total, nats, _ = model.summed_loss(rows)
        return total, nats

    over = lambda loss: jax.jit(  # noqa: E731
        jax.value_and_grad(loss, has_aux=True, allow_int=True)
    ).lower(model, rows)
    expected = over(by_token).compile()(model, rows)
    monkeypatch.setattr(head, "LARGEST_LOGITS", 4 * B * T * 20)
    monkeypatch.setattr(head, "SMALLEST_CHUNK", 16)  # chunks have no product with all ids
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    lowered = over(summed)
    products = re.findall(rf"dot_general.*tensor<(?:\d+x{V}|{V}x\d+)x", lowered.as_text())
    assert len(products) == 3, "logits, and the gradients of hidden states and of the kernel"
    once = lowered.compile()
    close(once(model, rows), expected)
    for wrong, why in ((rows[0], "give .batch, tokens"), (rows.tolist(), "are a list")):
        with pytest.raises(ValueError, match=why):
            model.loss(wrong)
    rows[0, 3] = -1
    total, nats = once(model, rows)[0]
    assert np.isnan(total) and np.isnan(nats[0]).all() and np.isfinite(nats[1]).all()


def test_several_devices_sum_the_gradient_of_a_kernel_once(monkeypatch):
    """Not for each part, so they have the loss of single tokens."""
    model, rows = quick_model(KINDS["plain"]), np.zeros((2, 2**20), np.int32)
    assert model._loss_parts(rows) == 0
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert model._loss_parts(rows) > 1
    model.constrain = lambda x: x
    assert model._loss_parts(rows) == 0


def test_the_head_of_a_subclass_is_called():
    def capped(name: str) -> type[Thoughtbubbles]:
        inherited = getattr(Thoughtbubbles, name)
        cap = lambda self, x: 3 * jnp.tanh(inherited(self, x) / 3)  # noqa: E731
        return type("Capped", (Thoughtbubbles,), {name: cap})

    targets, x = np.array([[1, 3]]), np.random.default_rng(0).normal(size=(1, 3, 16))
    token, alive = jnp.asarray([[0, 1, 1]]), jnp.ones((1, 3), bool)
    mixed = Streams.start(jnp.zeros((1, 2, 16))).replace(
        x=jnp.asarray(x, jnp.float32), token=token, log_score=-0.5 * token, alive=alive, forked=True
    )
    plain = Streams.start(mixed.x[:, 1:])
    for method, streams in itertools.product(("logits", "decode", "unembed"), (plain, mixed)):
        leaves, structure = jax.tree.flatten(quick_model(KINDS["probability"]))
        model: Any = jax.tree.unflatten(structure, leaves)
        model.__class__ = capped(method)

        @jax.jit
        def compute(streams, model=model):
            return jax.nn.log_softmax(model.logits(streams)), model.log_prob(streams, targets)

        log_probs, found = compute(streams)
        expected = np.take_along_axis(log_probs[0], targets.T, 1)[:, 0]
        np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_chunks_of_hidden_states_that_vary_alone():
    """Inside `shard_map`, where the targets are a constant."""
    mesh = jax.make_mesh((2,), ("data",))
    draw = np.random.default_rng(0).normal
    hidden, table = (jnp.asarray(draw(size=size), jnp.float32) for size in ((2, 3, 8), (10, 8)))

    def log_prob(hidden, table, chunks=2):
        targets = jnp.ones(hidden.shape[:2], jnp.int32)
        return head.head_log_prob(hidden, table, targets, chunks=chunks)

    rows = jax.device_put(hidden, NamedSharding(mesh, PartitionSpec("data")))
    specs = PartitionSpec("data"), PartitionSpec()
    split = jax.shard_map(log_prob, mesh=mesh, in_specs=specs, out_specs=specs[0])
    close(jax.jit(split)(rows, table), log_prob(hidden, table, 1))

    def nats(hidden, table, parts=2):
        targets = jnp.ones(hidden.shape[:2], jnp.int32)
        total, single = head.head_loss(hidden, table, targets, parts=parts)
        return jax.lax.psum(total, "data") if parts > 1 else total, single

    out = PartitionSpec(), specs[0]
    split = jax.shard_map(nats, mesh=mesh, in_specs=specs, out_specs=out)
    slopes = lambda f: jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))  # noqa: E731
    close(slopes(split)(rows, table), slopes(lambda *of: nats(*of, parts=1))(hidden, table))


def test_an_infinite_gradient_does_not_spread():
    values, gradient = jnp.ones(3), jnp.array([1.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(jax.jit(once_known)(values, gradient), values)


def test_number_of_chunks():
    assert head.num_chunks(1, 50_304) == 1
    assert head.num_chunks(8 * 1024, 32_768) == 16
    assert head.num_chunks(2**30, 50_304) == 64  # the next divisor above 49
    assert head.num_chunks(2**30, 1000) == 1  # too small a vocabulary to be cut
    assert head.num_parts(8, 64, 32_768, 256) == 0
    assert head.num_parts(8, 1024, 32_768, 256) == 16
    assert head.num_parts(8, 1024, 50_304, 768) == 22  # of up to 384 positions
    assert head.num_parts(384, 3, 50_304, 768) == 3 and head.num_parts(385, 3, 50_304, 768) == 0
    assert head.num_parts(1, 2048, 128_256, 4096) == 1


def test_a_sharded_vocabulary_is_never_gathered():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    put = lambda shape, *spec: jax.device_put(  # noqa: E731
        np.random.default_rng(0).normal(size=shape).astype(np.float32),
        NamedSharding(mesh, PartitionSpec(*spec)),
    )
    hidden, table = put((4, 6, 8), "data"), put((64, 8), "tensor")
    targets = np.arange(24, dtype=np.int32).reshape(4, 6)

    def total(hidden, table, chunks):
        return head.head_log_prob(hidden, table, targets, chunks=chunks).sum()

    both = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
    program: Any = both.lower(hidden, table, 4).compile()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", program.as_text())
    assert not [shape for shape in gathered if np.prod(list(map(int, shape.split(",")))) >= 16 * 8]
    close(program(hidden, table), both(hidden, table, 1), 1e-6)


def test_long_rows_merge_without_tokens_by_slots(monkeypatch):
    rng, slots, tokens = np.random.default_rng(0), 16, 9
    token, alive = np.zeros((3, slots), np.int32), np.zeros((3, slots), bool)
    for row, count in enumerate((11, 16, 0)):
        token[row, :count] = np.sort(rng.integers(0, tokens, count))
        alive[row, :count] = True
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    start = Streams.start(jnp.zeros((3, tokens, 5))).replace(
        token=jnp.asarray(token), alive=jnp.asarray(alive), forked=True
    )
    of_residual, of_log_prob = draw(3, tokens, 5), draw(3, tokens)

    def merged(x, log_score, log_prob):
        streams = start.replace(x=x, log_score=log_score)
        found = [forking.merge(streams, kind) for kind in ("residual", "rightmost")]
        mixed = forking.merge_log_prob(streams, log_prob, 64)
        return sum((f * of_residual).sum() for f in found) + (mixed * of_log_prob).sum(), (
            *found, mixed,
        )  # fmt: skip

    args = draw(3, slots, 5), -jnp.abs(draw(3, slots)), -jnp.abs(draw(3, slots))
    both = jax.value_and_grad(merged, (0, 1, 2), has_aux=True)
    expected = jax.jit(both)(*args)
    monkeypatch.setattr(forking, "LARGEST_MEMBERSHIP", 0)
    close(jax.jit(lambda *args: both(*args))(*args), expected)
    last, count = map(np.asarray, forking.bubble_ends(start))
    counts = [np.bincount(t[a], minlength=tokens) for t, a in zip(token, alive, strict=True)]
    np.testing.assert_array_equal(count, counts)
    assert (token[0][last[0][count[0] > 0]] == np.unique(token[0][:11])).all()


def test_large_attention_keeps_no_weights(monkeypatch):
    """Nor holds those of a block, where a block is large."""
    x = jax.ShapeDtypeStruct((2, 512, 4, 8), jnp.float32)

    def layers(query, key, value):
        for _ in range(4):
            query = jnp.tanh(attention.attend(query, key, value))
        return query.sum()

    needed = []
    for limit, tile in ((2**60, 2**60), (0, 2**60), (0, 2**14)):
        monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", limit)
        monkeypatch.setattr(attention, "LARGEST_TILE", tile)
        monkeypatch.setattr(attention, "SMALLEST_TILE", 4)
        program = jax.jit(jax.grad(lambda *args: layers(*args), (0, 1, 2))).lower(x, x, x)
        compiled: Any = program.compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    assert all(less < 0.7 * more for more, less in itertools.pairwise(needed)), needed


def test_gradients_in_few_bits_are_as_exact_as_their_bits(monkeypatch):
    """What all values have in common adds nothing to a gradient, though results are rounded."""
    monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", 0)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, 32, 2, 8)) for _ in range(4)]
    arrays[2] += 10
    few = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    bias = jnp.zeros((1, 32))

    @jax.jit
    def slopes(query, key, value, weigh, bias):
        mixed = lambda *args: (attention.attend(*args) * weigh).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(mixed, (0, 1, 2, 3))(query, key, value, bias)

    expected = slopes(*(array.astype(jnp.float32) for array in few), bias)
    for found, exact in zip(slopes(*few, bias), expected, strict=True):
        assert jnp.linalg.norm(found - exact) < 5e-3 * jnp.linalg.norm(exact)


def test_padding_of_tiles_adds_nothing_however_large_a_bias_is(monkeypatch):
    """Weights of it would overflow: infinity times a gradient of 0."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, 13, 2, 4)), jnp.float32) for _ in range(3)]
    bias = jnp.full((1, 13), 100.0)
    slopes = lambda: jax.jit(  # noqa: E731
        jax.grad(lambda *args: (attention.attend(*args) ** 2).sum(), (0, 1, 2, 3))
    )(*arrays, bias)
    monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", 0)
    expected = slopes()
    monkeypatch.setattr(attention, "LARGEST_TILE", 0)
    monkeypatch.setattr(attention, "SMALLEST_TILE", 5)
    for found, whole in zip(slopes(), expected, strict=True):
        np.testing.assert_allclose(found, whole, atol=1e-5)


def test_remat_saves_memory_without_scanned_layers(monkeypatch):
    monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", 0)
    config = dataclasses.replace(KINDS["residual"], num_layers=3, num_kv_heads=None)
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (8, 129))
    memory, flops, results = {}, {}, {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(config, remat=remat)
        program = compiled_loss(config, rows)
        memory[remat] = program.memory_analysis().temp_size_in_bytes
        flops[remat] = program.cost_analysis()["flops"]
        results[remat] = program(quick_model(config), rows)
    assert memory["full"] < 0.6 * memory["none"], memory
    assert memory["dots"] < 0.75 * memory["none"], memory
    again = {remat: value / flops["none"] for remat, value in flops.items()}
    assert again["dots"] < 1.08 and again["full"] > 1.2, again  # a norm counts, in so small a model
    close(results["dots"], results["none"])
    close(results["full"], results["none"])
