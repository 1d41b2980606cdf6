"""Weights in int8: a model whose weights were rounded, no more; fork layers exempt."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import SMALL, VOCAB, quick_model, random_tokens

from thoughtbubbles import Fork, ModelConfig, PrefixRank, Streams, Thoughtbubbles, quantisation
from thoughtbubbles.decoding import _begin, _continue, _Request, generate
from thoughtbubbles.hatchling import Hatchling, HatchlingConfig
from thoughtbubbles.quantisation import Int8Weight, quantise
from thoughtbubbles.sampling import Sampling
from train import generate as generate_command
from train.evaluate import EvaluateConfig
from train.generate import GenerateConfig
from train.models.load import load_weights

CONFIG = dataclasses.replace(
    SMALL, fork_layers=(1,), policy=PrefixRank(1.5), mlp="swiglu", merge="residual", tied_head=False
)
LLAMA = str(Path(__file__).parent / "fixtures/pretrained/llama")
KERNELS = {"q": 1, "k": 1, "v": 1, "o": 2, "up": 1, "gate": 1, "down": 1, "head": 1}
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


def rounded(matrix: np.ndarray) -> np.ndarray:
    """`[inputs, outputs]` as eight bits hold it, channel by channel."""
    result = np.zeros_like(matrix)
    for channel in range(matrix.shape[1]):
        scale = np.abs(matrix[:, channel]).max() / np.float32(127)
        if scale:
            result[:, channel] = np.rint(matrix[:, channel] / scale) * scale
    return result


def rounded_params(model: Thoughtbubbles) -> dict:
    """Parameters of a model with each kernel of each block rounded by NumPy."""

    def change(path, leaf):
        name, values = path[-1].key, np.asarray(leaf)
        if name == "embed":
            return rounded(values.T).T
        if name not in KERNELS:
            return values
        inputs = KERNELS[name]
        whole = values if path[0].key == "blocks" else values[None]
        flat = [layer.reshape(int(np.prod(layer.shape[:inputs])), -1) for layer in whole]
        return np.stack([rounded(layer) for layer in flat]).reshape(values.shape)

    params = nnx.to_pure_dict(nnx.state(model))
    return jax.tree_util.tree_map_with_path(change, params)


# Eager in the first test of a whole model: here one program in place of fifty.
quantised = jax.jit(quantise)
decoding = jax.jit(Thoughtbubbles.for_decoding)


@jax.jit
def logits_of(model, tokens):
    return model(tokens)


@pytest.mark.parametrize(("chunk", "outputs"), [(1 << 19, 16), (12, 16), (12, 17)])
def test_a_product_is_that_of_rounded_weights(chunk: int, outputs: int, monkeypatch):
    """In two chunks, in eight of two outputs, or in six with five left over; one channel is 0."""
    monkeypatch.setattr(quantisation, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    kernel, x = (
        rng.normal(size=(2, 2, outputs)).astype("f4"),
        rng.normal(size=(5, 2, 2)).astype("f4"),
    )
    kernel[..., 3] = 0
    weight = Int8Weight(jnp.asarray(kernel), inputs=2)
    assert weight.values.dtype == jnp.int8 and weight.values.shape == (outputs, 4)
    expected = x.reshape(5, 4) @ rounded(kernel.reshape(4, outputs))
    np.testing.assert_allclose(jax.jit(weight)(x), expected, atol=1e-5)
    error = np.abs(
        np.asarray(weight.values[...].T * weight.scale[...]) - kernel.reshape(4, outputs)
    )
    assert (error <= np.abs(kernel.reshape(4, outputs)).max(axis=0) / 127 / 2 * 1.0001).all()


def test_a_model_is_that_of_rounded_weights():
    model = quick_model(CONFIG)
    small = quantise(model)
    expected = Thoughtbubbles.from_params(model.config, rounded_params(model))
    tokens = jnp.asarray(random_tokens(2, 9))
    found = logits_of(small, tokens)
    np.testing.assert_allclose(found, logits_of(expected, tokens), atol=1e-4)
    assert np.abs(found - logits_of(model, tokens)).max() > 1e-3, "nothing was rounded"
    kept = lambda model: jax.tree.leaves((model.forks, model.final_norm))  # noqa: E731
    assert all(a is b for a, b in zip(kept(small), kept(model), strict=True))
    assert all(leaf.dtype == jnp.float32 for leaf in kept(small))


def test_a_tied_table_embeds_and_unembeds():
    model = quick_model(dataclasses.replace(CONFIG, tied_head=True))
    small, table = quantised(model), rounded(np.asarray(model.embed[...]).T)
    assert small.head is None
    ids = jnp.asarray([3, 0, VOCAB, -1])
    found = small.embed_tokens(ids)
    np.testing.assert_allclose(found[:2], table.T[[3, 0]], atol=1e-6)
    for vectors in (found, model.embed_tokens(ids)):
        assert np.isnan(vectors[2:]).all(), "ids outside the vocabulary"
    hidden = np.random.default_rng(0).normal(size=(2, 16)).astype("f4")
    np.testing.assert_allclose(small.unembed(jnp.asarray(hidden)), hidden @ table, atol=1e-5)


def test_cached_generation_is_that_of_whole_rows():
    """Each new token is the most probable one after the tokens before it, in a pass over all."""
    small = quantised(quick_model(CONFIG))
    prompts = [[1, 2, 3], [4, 5, 6]]
    texts = generate(small, prompts, 6)
    rows = jnp.asarray([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    assert texts == logits_of(small, rows)[:, 2:-1].argmax(axis=-1).tolist()
    other_way = quantised(decoding(quick_model(CONFIG)))
    jax.tree.map(np.testing.assert_array_equal, decoding(small), other_way)


def test_adapters_stand_beside_it():
    model = quick_model(CONFIG)
    rng = np.random.default_rng(1)
    deltas = {
        name: jnp.asarray(0.1 * rng.normal(size=(*stack, inputs, outputs)).astype("f4"))
        for name, (stack, inputs, outputs) in model.lora_targets.items()
    }
    adapter = {
        name: jax.tree_util.Partial(lambda delta, x: x @ delta, delta)
        for name, delta in deltas.items()
    }
    expected = Thoughtbubbles.from_params(model.config, rounded_params(model)).merge_lora(deltas)
    tokens = jnp.asarray(random_tokens(2, 9))
    found = logits_of(quantise(model).apply_lora(adapter).model, tokens)
    np.testing.assert_allclose(found, logits_of(expected, tokens), atol=1e-4)
    with pytest.raises(ValueError, match="q is in int8: merge adapters first, then quantise"):
        quantise(model).merge_lora(deltas)


def test_weights_take_a_quarter_of_the_memory():
    """Sizes of SmolLM2-135M; nothing is computed."""
    sizes = dict(vocab_size=49152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3)
    config = ModelConfig(**sizes, mlp_dim=1536, mlp="swiglu", norm="rmsnorm")
    model = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))
    small = jax.eval_shape(quantise, model)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(small) < 0.26 * size(model)


def test_no_program_holds_all_weights_in_float32():
    """Blocks are converted one by one, in the loop over tokens too, and not before it."""
    sizes = dict(vocab_size=32, embed_dim=16, num_layers=4, num_heads=2, mlp_dim=1024)
    config = ModelConfig(**sizes)  # pyright: ignore
    model = jax.eval_shape(lambda model: quantise(model).for_decoding(), quick_model(config))
    request = _Request.of(model, [[1, 2, 3]], 4, Sampling.of(0.0, None, None, None), 0, (), None)
    tokens, lengths = jnp.ones((1, 16), jnp.int32), jnp.array([3])
    begin = _begin.lower(model, tokens, lengths, request, 64)
    chosen, cache = jax.eval_shape(lambda m: _begin(m, tokens, lengths, request, 64), model)
    loop = _continue.lower(model, cache, chosen, lengths, request, jnp.bool_(False), 64)
    block = 4 * 2 * 16 * 1024  # bytes of the two large matrices of a block in float32
    for program in (begin, loop):
        assert program.compile().memory_analysis().temp_size_in_bytes < 2.5 * block


def test_rows_that_are_split_by_a_compiler_need_no_collective():
    """Under auto axes, where a barrier made of the input would be summed over the devices."""
    model = quantise(quick_model(CONFIG))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    tokens = jax.device_put(jnp.asarray(random_tokens(2, 9)), rows)
    compiled = logits_of.lower(model, tokens).compile()
    assert compiled.output_shardings.spec[0] == "data"
    assert not COLLECTIVE.findall(compiled.as_text())
    np.testing.assert_allclose(
        compiled(jax.device_put(model, NamedSharding(mesh, P())), tokens),
        logits_of(model, jnp.asarray(tokens)),
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit, "manual"])
def test_split_outputs_are_not_gathered(kind):
    axis = AxisType.Explicit if kind == "manual" else kind
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(axis,))
    values = np.random.default_rng(0).integers(-127, 128, (16, 8), np.int8)
    x, product = np.ones((3, 8), np.float32), quantisation._in_chunks
    if kind == "manual":
        product = jax.shard_map(product, in_specs=(P(), P("tensor")), out_specs=P(None, "tensor"))
    with jax.set_mesh(mesh):
        args = [
            jax.device_put(a, NamedSharding(mesh, p)) for a, p in ((x, P()), (values, P("tensor")))
        ]
        program = jax.jit(product).lower(*args).compile()
        np.testing.assert_array_equal(program(*args), x @ values.T)
    assert not COLLECTIVE.findall(program.as_text())


def test_mistakes():
    small = quantise(quick_model(CONFIG))
    with pytest.raises(ValueError, match="in int8 already: quantise it once"):
        quantise(small)
    config = HatchlingConfig(vocab_size=8, embed_dim=8, num_neurons=16, num_layers=1, num_heads=1)
    hatchling = nnx.eval_shape(lambda: Hatchling(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="Hatchling has no int8 form: give a Thoughtbubbles model"):
        quantise(hatchling)


@pytest.mark.parametrize("stored", ["int8", "an object"])
def test_scores_that_a_library_has_quantised_are_refused(stored: str):
    fork = Fork(8, PrefixRank(2.0), rngs=nnx.Rngs(0))
    other = jnp.zeros((8, 2), jnp.int8) if stored == "int8" else {"qvalue": jnp.zeros((8, 2))}
    fork.score.set_value(other)
    with pytest.raises(
        ValueError, match='must be float32 or bfloat16, .*: exclude "forks" from quantisation'
    ):
        fork(Streams.start(jnp.ones((1, 4, 8))))


def test_the_commands(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(generate_command, "write", lambda lm, *rest, **how: seen.append(lm) or [""])
    for int8 in (False, True):
        generate_command.main(GenerateConfig(model=LLAMA, int8=int8))
        config = EvaluateConfig(model=LLAMA, tasks=("a.jsonl",), int8=int8)
        seen.append(config.changed(load_weights(LLAMA)))
    kinds = [isinstance(lm.model.embed, Int8Weight) for lm in seen]
    assert kinds == [False, False, True, True]


def test_weights_that_are_no_numbers_stay_so():
    """A diverged or damaged checkpoint must not look healthy."""
    kernel = np.ones((4, 3), np.float32)
    kernel[0, 1], kernel[1, 2] = np.nan, np.inf
    found = np.asarray(Int8Weight(jnp.asarray(kernel))(jnp.ones((1, 4))))
    assert np.isfinite(found[0]).tolist() == [True, False, False]


def test_scores_of_eight_bits_are_refused_as_floats_too():
    fork = Fork(8, rngs=nnx.Rngs(0))
    fork.score.set_value(fork.score.get_value().astype(jnp.float8_e4m3fn))
    with pytest.raises(ValueError, match="float8_e4m3fn, and must be float32 or bfloat16"):
        fork(Streams.start(jnp.zeros((1, 3, 8))))


def test_a_batch_over_explicit_axes_is_that_of_one_device():
    draw = np.random.default_rng(0).normal
    weight = Int8Weight(jnp.asarray(draw(size=(8, 6)), jnp.float32))
    x, ids = jnp.asarray(draw(size=(2, 3, 8)), jnp.float32), jnp.asarray([[0, 5], [3, 1]])
    expected = weight(x), weight.rows(ids)
    mesh = jax.make_mesh((2,), ("data",))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        found = jax.jit(lambda weight, x, ids: (weight(x), weight.rows(ids)))(
            weight, jax.device_put(x, rows), jax.device_put(ids, rows)
        )
        assert all(array.sharding.spec[0] == "data" for array in found)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
