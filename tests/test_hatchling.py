"""Dragon Hatchling: golden numbers of the authors' code, a float64 reference, invariants."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hatchling_tiny import FORMS, GOLDEN, drawn, logits_of, reference, wide

from thoughtbubbles.hatchling import Hatchling, HatchlingConfig
from thoughtbubbles.hatchling.attention import by_head, frequencies, normalized, rotate
from thoughtbubbles.hatchling.config import PRESETS
from train.aot.hlo import collectives_of
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step

TOKENS, TARGETS = np.array([[1, 5, 3, 9, 0, 7]]), np.array([[5, 3, 9, 0, 7, 2]])
FIRST = "-.27960 -.46442 -.58637 -.62897 -.58643 -.46453 -.27975 -.05711 .17326 .38018 .53564"
LAST = "-.25661 -.44369 -.57072 -.62050 -.58630 -.47275 -.29522 -.07773 .15029 .35796 .51718"


def waves(shape: tuple[int, ...], amplitude: float, shift: float) -> np.ndarray:
    wave = amplitude * np.sin(0.37 * np.arange(np.prod(shape)) + shift)
    return wave.reshape(shape).astype(np.float32)


def made(config: HatchlingConfig) -> Hatchling:
    """A model with the parameters of the golden numbers."""
    model = Hatchling(config, rngs=nnx.Rngs(0))
    heads, width, neurons = config.num_heads, config.embed_dim, config.head_neurons
    model.embed[...] = waves((config.vocab_size, width), 1, 0)
    model.dx[...] = waves((heads, width, neurons), 0.5, 1).swapaxes(0, 1)
    model.dy[...] = waves((heads, width, neurons), 0.5, 2).swapaxes(0, 1)
    model.e[...] = waves((heads * neurons, width), 0.5, 3).reshape(heads, neurons, width)
    model.head[...] = waves((width, config.vocab_size), 0.5, 4)
    return model


def test_golden_numbers_of_the_authors_code():
    logits = np.asarray(logits_of(made(GOLDEN), TOKENS))[0]
    np.testing.assert_allclose(logits[0], [float(x) for x in FIRST.split()], atol=6e-6)
    np.testing.assert_allclose(logits[5], [float(x) for x in LAST.split()], atol=6e-6)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert -log_probs[np.arange(6), TARGETS[0]].mean() == pytest.approx(2.606666, abs=1e-6)
    assert logits.sum() == pytest.approx(-9.860228, abs=1e-5)
    assert np.abs(logits).sum() == pytest.approx(26.227123, abs=1e-5)
    found = frequencies(16, GOLDEN.rope_base)[::2][:5]
    np.testing.assert_allclose(found, [0.15915, 0.03979, 0.00995, 0.00249, 0.00062], atol=5e-6)


def test_the_first_token_reads_nothing():
    """An empty past leaves layer norms alone, which are not idempotent: one a layer, and one."""
    model = drawn(GOLDEN)
    value = model.embed[...][TOKENS[0, :1]]
    for _ in range(GOLDEN.num_layers + 1):
        value = normalized(value)
    found = model.run(jnp.asarray(TOKENS)).hidden[0, :1]
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("config", FORMS, ids=lambda c: f"{c.form}-{c.damping}")
def test_parallel_chunked_and_recurrent_are_the_float64_reference(config):
    tokens = np.random.default_rng(0).integers(11, size=(1, 19))
    expected = reference(config, wide(drawn(config)), tokens[0])
    scale = np.abs(expected).max()
    for chunk in (None, 1, 4):  # 4 leaves a rest
        model = drawn(dataclasses.replace(config, chunk=chunk))
        found = np.asarray(logits_of(model, tokens))[0]
        assert np.abs(found - expected).max() < 1e-5 * scale, chunk


@pytest.mark.parametrize("config", FORMS, ids=lambda c: f"{c.form}-{c.damping}")
def test_rows_cut_anywhere_are_rows_read_whole(config):
    """Also with unequal rows, of which some rest in a call."""
    tokens = np.random.default_rng(1).integers(11, size=(3, 12))
    model = drawn(config)
    expected = np.asarray(logits_of(model, tokens))
    step = jax.jit(lambda model, *inputs: model.advance(*inputs))
    cache, done = model.init_cache(3, 12), np.zeros(3, int)
    found = np.zeros_like(expected)
    for lengths in ([1, 0, 4], [3, 4, 0], [4, 4, 2], [0, 4, 4], [4, 0, 2]):
        part = np.zeros((3, 4), np.int32)
        for row, count in enumerate(lengths):
            part[row, :count] = tokens[row, done[row] : done[row] + count]
        hidden, cache = step(model, cache, part, np.array(lengths, np.int32))
        for row, count in enumerate(lengths):
            found[row, done[row] : done[row] + count] = model.unembed(hidden)[row, :count]
        done += lengths
    assert (done == 12).all()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_gradients_through_a_carried_state_are_those_of_the_whole_row():
    tokens = np.random.default_rng(2).integers(11, size=(2, 17))
    gradient = jax.jit(jax.grad(lambda m: m.loss(tokens)[0], allow_int=True))
    whole, chunked = (
        jax.tree.leaves(nnx.state(gradient(drawn(config)), nnx.Param))
        for config in (GOLDEN, dataclasses.replace(GOLDEN, chunk=5))
    )
    for mine, theirs in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())


def test_neuron_pairs_have_no_order():
    model, other = made(GOLDEN), made(GOLDEN)
    order = np.random.default_rng(3).permutation(8)
    index = np.stack([2 * order, 2 * order + 1], axis=1).ravel()
    for param in (other.dx, other.dy, other.frequency):
        param[...] = param[...][..., index]
    other.e[...] = other.e[...][:, index]
    np.testing.assert_allclose(logits_of(other, TOKENS), logits_of(model, TOKENS), atol=1e-5)


def test_sparsity_is_counted_over_real_tokens():
    model = made(GOLDEN)
    read = jax.jit(lambda m, t, n: m.run(t, n))(model, TOKENS, np.array([6]))
    shown = Hatchling.step_metrics(GOLDEN, jax.device_get(model.statistics(read)))
    assert shown["layer_0/x_active"] == 96 / 192
    assert 0 < shown["layer_1/y_active"] <= shown["layer_1/x_active"] < 1
    padded = np.pad(TOKENS, ((0, 0), (0, 3)))
    other = jax.jit(lambda m, t, n: m.run(t, n))(model, padded, np.array([6]))
    for mine, theirs in zip(
        jax.tree.leaves(model.statistics(other)),
        jax.tree.leaves(model.statistics(read)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_dropout_doubles_the_neurons_that_it_keeps():
    """With a rate of a half; without a key it drops none, and what is counted is before it."""
    seen = []

    class Probe(Hatchling):
        def _project(self, y):
            seen.append(np.asarray(y))
            return super()._project(y)

    config = dataclasses.replace(GOLDEN, dropout=0.5, num_layers=1, remat="none")
    model = Probe(config, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state(drawn(config)))
    with jax.disable_jit():
        whole, dropped = (model.run(TOKENS, key=key) for key in (None, jax.random.key(0)))
    plain, noisy = seen
    kept = noisy != 0
    np.testing.assert_array_equal(noisy[kept], 2 * plain[kept])
    assert 0.3 < kept.sum() / (plain != 0).sum() < 0.7
    assert whole.y_active == dropped.y_active == (plain > 0).sum()


def test_bfloat16_is_computed_in_bfloat16_with_a_float32_state():
    """Of float32 vectors too, such as latents; in parts as at once."""
    model = drawn(dataclasses.replace(GOLDEN, dtype="bfloat16"))
    x = np.random.default_rng(5).normal(size=(2, 9, 8)).astype(np.float32)
    length = np.full(2, 9, np.int32)
    whole = jax.jit(lambda m: m.hidden_states(x, length))(model)
    extend = jax.jit(lambda m, *inputs: m.extend(*inputs))
    first, cache = extend(model, model.init_cache(2, 9), x[:, :5], length - 4)
    second, cache = extend(model, cache, x[:, 5:], length - 5)
    assert whole.dtype == first.dtype == jnp.bfloat16 and cache.synapses.dtype == jnp.float32
    parts = np.concatenate([first, second], axis=1).astype(np.float32)
    np.testing.assert_allclose(parts, whole.astype(np.float32), atol=0.1)
    assert np.abs(parts - whole.astype(np.float32)).mean() < 0.01


def test_a_fresh_state_is_only_written():
    model = drawn(GOLDEN)
    extend = jax.jit(lambda m, fresh: m.extend(
        m.init_cache(1, 6), m.embed_tokens(TOKENS), np.array([6]), fresh=fresh
    ), static_argnums=1)  # fmt: skip
    for mine, theirs in zip(
        *map(jax.tree.leaves, (extend(model, True), extend(model, False))), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_no_vectors_change_nothing_and_a_wrong_length_is_nan():
    model = drawn(GOLDEN)
    cache = model.init_cache(1, 6)
    hidden, same = model.advance(cache, jnp.asarray(TOKENS[:, :0]), jnp.array([0]))
    assert hidden.shape == (1, 0, 8) and same is cache
    hidden, _ = model.advance(cache, jnp.asarray(TOKENS), jnp.array([7]))
    assert np.isnan(hidden).all()


def test_presets_have_the_sizes_of_their_names():
    assert PRESETS["25m"].num_params() == 25_296_896
    for name, millions in (("10m", 10), ("50m", 50), ("100m", 100), ("400m", 400), ("1b", 1000)):
        assert PRESETS[name].num_params() / 1e6 == pytest.approx(millions, rel=0.06), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_neurons": 30, "num_heads": 4},
            "num_neurons=30 does not divide into num_heads=4 .* multiple of 8, such as 32",
        ),
        ({"num_neurons": 2, "num_heads": 2}, "num_neurons=2 does not divide"),
        ({"chunk": 0}, "chunk=0 is below 1: leave it out"),
        ({"form": "printed"}, "form='printed': choose released or paper"),
        ({"dropout": 1.0}, "dropout=1.0: choose 0 or more, below 1"),
        ({"rope_base": 0.0}, "rope_base=0.0: choose a positive number"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOLDEN, **changes)


def test_a_state_of_another_batch_is_refused():
    model = made(GOLDEN)
    with pytest.raises(ValueError, match="a state of 2 rows for vectors of 1: begin with"):
        model.advance(model.init_cache(2, 8), jnp.asarray(TOKENS), jnp.array([6]))


def test_an_adapter_beside_the_model_is_one_merged_into_it():
    model, rng = drawn(GOLDEN), np.random.default_rng(4)
    deltas = {
        name: jnp.asarray(0.1 * rng.normal(size=(inputs, outputs)), jnp.float32)
        for name, (_, inputs, outputs) in model.lora_targets.items()
    }
    adapter = {name: jax.tree_util.Partial(lambda d, x: x @ d, d) for name, d in deltas.items()}
    found = logits_of(model.apply_lora(adapter), TOKENS)
    np.testing.assert_allclose(found, logits_of(model.merge_lora(deltas), TOKENS), atol=1e-5)
    assert np.abs(found - logits_of(model, TOKENS)).max() > 1e-2
    with pytest.raises(ValueError, match="no linear layer 'q': choose from dx, e"):
        model.apply_lora({"q": adapter["e"]})


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_length_that_the_vectors_lack_makes_its_row_wrong_for_good(chunk):
    model = Hatchling(dataclasses.replace(GOLDEN, num_layers=1, chunk=chunk), rngs=nnx.Rngs(0))
    vectors = jnp.ones((3, 4, GOLDEN.embed_dim))
    extend = jax.jit(lambda cache, length: model.extend(cache, vectors, length))
    hidden, cache = extend(model.init_cache(3, 8), jnp.array([7, 4, -2]))
    again, _ = extend(cache, jnp.array([4, 4, 4]))
    for found in (hidden, again):
        wrong = np.isnan(found).all(axis=(1, 2))
        assert wrong.tolist() == [True, False, True] and np.isfinite(found[1]).all()


def test_depth_costs_no_memory_in_training():
    """Nothing as wide as the neurons is kept for all layers."""

    def temporaries(layers: int) -> int:
        config = dataclasses.replace(GOLDEN, num_layers=layers, num_neurons=512, num_heads=2)
        model = nnx.eval_shape(lambda: Hatchling(config, rngs=nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        step = jax.jit(
            nnx.grad(lambda model, tokens: model.log_prob(model.run(tokens), tokens).sum())
        )
        return step.lower(model, tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(12) < 1.1 * temporaries(2)


def test_neurons_stay_on_their_devices_in_training():
    """What moves between devices is of a weight's size, or of width d, and not of n for a token."""
    config = dataclasses.replace(GOLDEN, vocab_size=12, num_neurons=256)
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    trainable = make_trainable(config, OptimizerConfig(), 8, mesh)
    tokens = place(np.zeros((4, 65), np.int32), mesh)
    step = make_train_step(trainable).lower(trainable.abstract, tokens).compile()
    moved = [item.size for item in collectives_of(step.as_text(), 4).items]
    neurons_of_a_row = 64 * config.num_neurons // 2 * 4
    assert moved and max(moved) < neurons_of_a_row


def test_the_gradient_of_a_heads_matrix_is_made_in_its_own_order():
    """A product [H, d, N]; one of [H, N, d] takes a CPU almost twice as long."""
    x, weights, change = jnp.ones((2, 3, 32, 16)), jnp.ones((16, 2, 64)), jnp.ones((2, 3, 32, 64))
    gradient = jax.jit(lambda x, weights, change: jax.vjp(by_head, x, weights)[1](change)[1])
    products = re.findall(
        r"(\S+)\{\S+ dot\(", gradient.lower(x, weights, change).compile().as_text()
    )
    assert products == ["f32[2,16,64]"]
    np.testing.assert_array_equal(gradient(x, weights, change), np.full(weights.shape, 96.0))


def test_rotation_makes_no_axis_of_pairs():
    """XLA's TPU compiler takes minutes and gigabytes for one beside thousands of neurons."""
    x, angle = jnp.ones((1, 3, 2, 16)), np.arange(3.0)[:, None, None] * np.arange(8).repeat(2)
    turns = jnp.asarray(np.cos(angle)[None]), jnp.asarray(np.sin(angle)[None])
    found = rotate(x * jnp.arange(16.0), turns)
    even, odd, (cos, sin) = np.arange(0, 16, 2), np.arange(1, 16, 2), map(np.asarray, turns)
    want = np.empty(x.shape)
    want[..., even] = even * cos[..., even] - odd * sin[..., even]
    want[..., odd] = odd * cos[..., even] + even * sin[..., even]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    lowered = jax.jit(jax.grad(lambda x: rotate(x, turns).sum())).lower(x)
    assert "x8x" not in lowered.as_text()
