"""Kernels stored transposed on a CPU: the same model, no copies, only where it pays."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_tiny
from flax import nnx
from test_for_decoding import CONFIG, PROMPTS, temporaries

from thoughtbubbles import ModelConfig, Thoughtbubbles, decoding, transposed
from thoughtbubbles.decoding import generate
from thoughtbubbles.quantisation import quantise
from thoughtbubbles.transposed import TransposedKernel, can_transpose, transpose_kernels

BATCH = [[1, 2, 3], [4, 5], [6]]
UNTIED = dataclasses.replace(
    CONFIG, tied_head=False, mlp="swiglu", num_kv_heads=1, biases="all", fork_layers=(1,)
)


def made(config: ModelConfig) -> Thoughtbubbles:
    abstract = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))
    return rl_tiny.filled(abstract, scale=0.1)


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch):
    """Models of a test are large enough."""
    monkeypatch.setattr(transposed, "LEAST_BYTES", 0)
    monkeypatch.setattr(transposed, "LEAST_ELEMENTS", 0)


@jax.jit
def scored(model: Thoughtbubbles, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    output = model.run(tokens)
    return model.logits(output), model.log_prob(output, tokens)


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [1, 2, 100])  # a vector, with the kernel first, with it second
def test_it_is_the_same_model(config, rows):
    model = made(config)
    form = model.for_decoding()
    assert can_transpose(form)
    transpose_kernels(form, batch=rows > 1)
    assert not can_transpose(form)
    kernels = [k for _, k in nnx.iter_graph(form) if isinstance(k, TransposedKernel)]
    of_layer = 5 if rows == 1 else 7 if config.mlp == "swiglu" else 6  # without up and gate
    assert len(kernels) == config.num_layers * of_layer + (config.tied_head and rows > 1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (rows, 1 if rows < 3 else 3)))
    for found, expected in zip(scored(form, tokens), scored(model, tokens), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_counts")
def test_a_batch_is_generated_with_it_and_a_single_prompt_uses_what_is_there():
    model = made(CONFIG)
    for_blocks = decoding.decoding_form(model, None)  # of tokens, as scores need it
    assert isinstance(for_blocks.unstacked[0].mlp.down, nnx.Param)
    alone = [generate(model, [prompt], 6)[0] for prompt in BATCH]
    [kept] = decoding._KEPT
    assert isinstance(kept.form.unstacked[0].mlp.up, nnx.Param)
    assert isinstance(kept.form.unstacked[0].mlp.down, TransposedKernel)
    assert generate(model, BATCH, 6) == alone
    assert isinstance(kept.form.unstacked[0].mlp.up, nnx.Param), "a thread may decode with it"
    [kept] = decoding._KEPT
    assert isinstance(kept.form.unstacked[0].mlp.up, TransposedKernel)
    assert kept.form.head.matrix.get_value() is kept.form.embed.get_value()
    assert generate(model, BATCH, 6) == alone and decoding._KEPT[0] is kept
    assert generate(model, [BATCH[0]], 6) == alone[:1]
    assert isinstance(model.for_decoding().unstacked[0].mlp.up, nnx.Param)
    held = model.for_decoding()  # by the caller, who holds one copy of the weights
    generate(held, BATCH, 6)
    assert isinstance(held.unstacked[0].mlp.up, nnx.Param)


@pytest.mark.usefixtures("small_counts")
def test_the_model_of_a_command_is_transposed_for_its_prompts():
    loaded = dataclasses.replace(rl_tiny.language_model("shallow"), model=made(CONFIG))
    expected = generate(loaded.model, BATCH, 6)
    for rows, up, down in ((None, 0, 0), (1, 0, 1), (3, 1, 1)):
        inference = loaded.for_inference(rows)
        mlp = inference.model.for_decoding().unstacked[0].mlp
        kinds = [isinstance(kernel, TransposedKernel) for kernel in (mlp.up, mlp.down)]
        assert kinds == [up, down]
        assert generate(inference.model, BATCH, 6) == expected
        assert inference.for_inference(3).model.unstacked[0].mlp is mlp, "it is the caller's"


@pytest.mark.parametrize(("rows", "found"), [(1, "1,40"), (8, "40,8"), (300, "300,40")])
def test_the_kernel_is_the_first_operand_of_a_few_rows(rows, found):
    """XLA folds transposes into a product, unless barriers keep it as it is written."""
    kernel = TransposedKernel(jnp.ones((40, 24)), (40,))
    program = jax.jit(lambda kernel, x: kernel(x)).lower(kernel, jnp.ones((rows, 24))).compile()
    products = re.findall(r"f32\[([\d,]+)\]\{1,0[^}]*\} dot\(", program.as_text())
    assert products == [found]


@pytest.mark.usefixtures("small_counts")
def test_no_program_copies_a_kernel():
    model = made(CONFIG)
    stack = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks))
    form = model.for_decoding()
    transpose_kernels(form, batch=True)
    _, loop = temporaries(form, PROMPTS * 3)
    assert loop < stack / 12, "a kernel is copied: one of the MLP is a seventh"


def test_only_large_models_in_float32_on_one_cpu_are_changed(monkeypatch):
    model = made(CONFIG)
    assert not can_transpose(model.for_decoding())  # small
    monkeypatch.setattr(transposed, "LEAST_BYTES", 0)
    form = model.for_decoding()
    assert can_transpose(form)
    transpose_kernels(form, batch=True)
    assert isinstance(form.unstacked[0].mlp.up, nnx.Param)  # 16,384 elements
    monkeypatch.setattr(transposed, "LEAST_ELEMENTS", 0)
    assert not can_transpose(model)  # stacked
    assert not can_transpose(quantise(model.for_decoding()))
    assert not can_transpose(made(dataclasses.replace(CONFIG, dtype="bfloat16")).for_decoding())
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    assert not can_transpose(jax.device_put(model.for_decoding(), everywhere))
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    assert not can_transpose(halves.for_decoding())
    assert jax.jit(lambda model: can_transpose(model.for_decoding()) or 0)(model) == 0


@pytest.mark.usefixtures("small_counts")
def test_a_subclass_keeps_its_kernels():
    class Own(Thoughtbubbles):
        def unembed(self, hidden):
            return super().unembed(hidden) if self.head is None else hidden @ self.head[...]

    abstract = nnx.eval_shape(lambda: Own(CONFIG, rngs=nnx.Rngs(0)))
    model = rl_tiny.filled(abstract, scale=0.1)
    assert generate(model, BATCH, 4) == generate(made(CONFIG), BATCH, 4)
    assert isinstance(decoding.decoding_form(model, None, 3).unstacked[0].mlp.up, nnx.Param)
