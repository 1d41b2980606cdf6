"""Blocks out of their stack: once for a model, copied by no program, adapters and all."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_tiny
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles, decoding, forward
from thoughtbubbles.decoding import _begin, _continue, _Request, generate
from thoughtbubbles.sampling import Sampling

# Weights are most of the memory: the MLP of a block alone has 4 D F = 131 kB.
CONFIG = ModelConfig(vocab_size=32, embed_dim=16, num_layers=3, num_heads=2, mlp_dim=1024)
PROMPTS = [[1, 2, 3]]


@pytest.fixture
def model() -> Thoughtbubbles:
    abstract = nnx.eval_shape(lambda: Thoughtbubbles(CONFIG, rngs=nnx.Rngs(0)))
    return rl_tiny.filled(abstract, scale=0.1)


def once(model) -> np.ndarray:
    """Logits of the prompts, in one program."""
    return np.asarray(jax.jit(lambda: model(jnp.array(PROMPTS)))())


def temporaries(model: Thoughtbubbles, prompts: list[list[int]] = PROMPTS) -> tuple[int, int]:
    """Bytes of temporaries of the programs of `generate`: of the prefill and of the loop."""
    request = _Request.of(model, prompts, 4, Sampling.of(0.0, None, None, None), 0, (), None)
    rows = len(prompts)
    tokens, lengths = jnp.ones((rows, 16), jnp.int32), jnp.full(rows, 3)
    begin = _begin.lower(model, tokens, lengths, request, 64)
    chosen, cache = jax.eval_shape(lambda: _begin(model, tokens, lengths, request, 64))
    loop = _continue.lower(model, cache, chosen, lengths, request, jnp.bool_(False), 64)
    sizes = [program.compile().memory_analysis() for program in (begin, loop)]
    first, second = (size.temp_size_in_bytes for size in sizes)  # pyright: ignore
    return first, second


def test_no_program_copies_the_stack(model: Thoughtbubbles):
    stack = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks))
    assert min(temporaries(model)) > stack  # so it would be seen
    assert max(temporaries(model.for_decoding())) < stack / 3, "a block, or more, is copied"


def test_blocks_are_taken_out_once(model: Thoughtbubbles, monkeypatch):
    taken = []

    def take_apart(stack):
        taken.append(stack)
        return list(stack)

    monkeypatch.setattr(forward, "_take_apart", take_apart)
    once = generate(model, PROMPTS, 4)
    stacks = len(jax.tree.leaves(model.blocks))
    assert len(taken) == stacks
    assert generate(model, PROMPTS, 4) == once and len(taken) == stacks
    assert generate(model.for_decoding(), PROMPTS, 4) == once
    # Other weights in the same model are other blocks.
    assert model.blocks is not None
    up = model.blocks.mlp.up
    up.set_value(-up[...])
    taken.clear()
    changed = generate(model, PROMPTS, 4)
    assert len(taken) == stacks
    assert changed == generate(jax.tree.map(lambda leaf: leaf + 0, model), PROMPTS, 4)


@pytest.mark.usefixtures("few_objects")
def test_what_is_kept_goes_with_the_model(model: Thoughtbubbles):
    other = jax.tree.map(lambda leaf: leaf + 0, model)
    generate(model, PROMPTS, 4)
    generate(other, PROMPTS, 4)
    assert len(decoding._KEPT) == 1
    del other
    gc.collect()
    assert not decoding._KEPT


def test_nothing_is_kept_of_another_model(model: Thoughtbubbles):
    """Arrays of NumPy that were written in place, the same arrays under another config."""
    once = generate(model, PROMPTS, 4)
    [before] = decoding._KEPT
    arrays = jax.tree.map(np.array, model)
    assert generate(arrays, PROMPTS, 4) == once and decoding._KEPT[0] is before
    assert arrays.blocks is not None
    arrays.blocks.mlp.up[...] *= -1
    changed = jax.tree.map(jnp.asarray, arrays)
    assert generate(arrays, PROMPTS, 4) == generate(changed, PROMPTS, 4)
    model.config = dataclasses.replace(CONFIG, context_length=64)
    generate(model, PROMPTS, 4)
    assert decoding._KEPT[0].form.config.context_length == 64 != before.form.config.context_length


@pytest.mark.usefixtures("few_objects")
def test_weights_are_in_memory_once(model: Thoughtbubbles):
    logits = once(model)
    other = jax.tree.map(lambda leaf: leaf + 0, model)
    stacks = [weakref.ref(leaf) for leaf in jax.tree.leaves(other.blocks)]
    loaded = dataclasses.replace(rl_tiny.language_model("shallow"), model=other)
    del other
    loaded = loaded.for_inference()
    gc.collect()
    inference = loaded.model
    assert [stack() for stack in stacks] == [None] * len(stacks)
    assert isinstance(inference, Thoughtbubbles) and inference.blocks is None
    np.testing.assert_allclose(once(inference), logits, rtol=1e-5, atol=1e-5)
    assert inference.for_decoding() is inference


def test_adapters_are_added_to_either_form(model: Thoughtbubbles):
    backbone = model.backbone()
    deltas = {
        name: jnp.full((*stack, inputs, outputs), 0.01)
        for name, (stack, inputs, outputs) in backbone.lora_targets.items()
    }
    expected = once(backbone.merge_lora(deltas))
    found = once(backbone.for_decoding().merge_lora(deltas))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - once(model)).max() > 0.01

    class Doubled(nnx.Module):
        def __init__(self, matrix):
            self.matrix = nnx.Param(matrix)

        def __call__(self, x):
            return x @ self.matrix[...]

    adapters = {name: Doubled(delta) for name, delta in deltas.items()}
    for form in (backbone, backbone.for_decoding(), backbone.apply_lora(adapters).for_decoding()):
        adapted = form if form.model.unstacked and form.model.unstacked[0].mlp.adapters else None
        adapted = adapted or form.apply_lora(adapters)
        np.testing.assert_allclose(once(adapted.model), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="has an adapter already"):
            adapted.apply_lora(adapters)
    attention, mlp = (
        {name: adapters[name] for name in adapters if (name in "qkvo") == is_attention}
        for is_attention in (True, False)
    )
    both = backbone.apply_lora(attention).apply_lora(mlp)
    np.testing.assert_allclose(once(both.model), expected, rtol=1e-5, atol=1e-5)
