"""The models of docs/import.md: decoders of others with fork layers, trained, saved and cached."""

import difflib
import functools
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from thoughtbubbles import (
    Fork,
    ModelConfig,
    PrefixRank,
    Streams,
    Thoughtbubbles,
    Threshold,
    TopK,
    left_align,
    restore_alignment,
)

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {"rotary": "Rotary", "left_padded": "Learned", "linen": "Linen"}
ROWS, TOKENS, CAPACITY, VOCAB = 4, 8, 12, 50


def code_of(name: str) -> str:
    page = (ROOT / "docs/import.md").read_text()
    return re.search(rf"## {SECTIONS[name]}.*?```python\n(.*?)```", page, re.DOTALL)[1]


@functools.cache
def module_of(name: str) -> types.SimpleNamespace:
    """What the page's model defines, without the lines at its end that run it."""
    definitions = re.split(r"\n\n\n(?=model)", code_of(name))[0]
    values: dict[str, Any] = {}
    exec(compile(definitions, f"docs/import.md {name}", "exec"), values)
    return types.SimpleNamespace(**values)


class Model(NamedTuple):
    """A page's model as pure functions of its parameters; rows are right-padded here."""

    params: Any
    logits: Callable
    init_cache: Callable
    extend: Callable


@functools.cache
def model_of(name: str) -> Model:
    """Scores far from each other, so that some tokens fork and others do not."""
    module = module_of(name)
    if name == "linen":
        model = module.Decoder(VOCAB, 32, 32, 4)
        params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, TOKENS), jnp.int32))
        params["params"]["fork"]["score"] = jax.tree.map(
            lambda leaf: 30 * leaf, params["params"]["fork"]["score"]
        )
        return Model(
            params,
            lambda params, tokens, length: model.apply(params, tokens, length),
            lambda params: model.apply(params, ROWS, CAPACITY, method="init_cache"),
            lambda params, *given: model.apply(params, *given, method="extend"),
        )
    make = {
        "rotary": lambda rngs: module.Decoder(VOCAB, 32, 2, 4, 2, 8, rngs=rngs),
        "left_padded": lambda rngs: module.GPT2(VOCAB, 32, 32, 2, 4, rngs=rngs),
    }[name]
    graph, params = nnx.split(jax.jit(lambda: make(nnx.Rngs(0)))())
    params["fork"]["score"][...] = 30 * np.asarray(params["fork"]["score"][...])

    def given(tokens, length):
        return length if name == "rotary" else jnp.arange(tokens.shape[1]) < length[:, None]

    return Model(
        params,
        lambda params, tokens, length: nnx.merge(graph, params)(tokens, given(tokens, length)),
        lambda params: nnx.merge(graph, params).init_cache(ROWS, CAPACITY),
        lambda params, cache, tokens, length: nnx.merge(graph, params).extend(
            cache, tokens, given(tokens, length)
        ),
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_a_model_differs_by_few_lines(name: str):
    unforked = (ROOT / f"tests/unforked/{name}.py").read_text().splitlines()
    forked = re.split(r"\n\n\n(?=model)", code_of(name))[0].splitlines()
    changed = [line for line in difflib.ndiff(unforked, forked) if line.startswith("+ ")]
    assert 10 < sum(bool(line[2:].strip()) for line in changed) <= 60


@pytest.mark.parametrize("name", SECTIONS)
def test_a_model_trains_is_saved_and_decodes_as_it_was_trained(name: str, tmp_path: Path):
    model, rng = model_of(name), np.random.default_rng(0)
    rows = (rng.integers(0, VOCAB, (ROWS, 1)) + np.arange(TOKENS + 1)) % VOCAB  # counting
    full = np.full(ROWS, TOKENS, np.int32)
    tokens, targets = (jnp.asarray(part, jnp.int32) for part in (rows[:, :-1], rows[:, 1:]))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.logits(params, tokens, full)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, gradients = jax.value_and_grad(loss, allow_int=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = model.params, optimizer.init(model.params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2, losses

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
        restored = checkpointer.restore(tmp_path / "params", abstract)
    jax.tree.map(np.testing.assert_array_equal, params, restored)

    expected = np.asarray(jax.jit(model.logits)(restored, tokens, full))
    extend, cache = jax.jit(model.extend), model.init_cache(restored)
    found, done = np.zeros_like(expected), np.zeros(ROWS, np.int32)
    while (done < TOKENS).any():  # parts of 0 to 3 tokens, another number in each row
        size = np.minimum(rng.integers(0, 4, ROWS), TOKENS - done).astype(np.int32)
        at = np.minimum(done[:, None] + np.arange(6), TOKENS - 1)
        logits, cache = extend(restored, cache, np.take_along_axis(rows, at, 1), size)
        for row in range(ROWS):
            found[row, done[row] : done[row] + size[row]] = logits[row, : size[row]]
        done += size
    np.testing.assert_allclose(found, expected, atol=1e-4)
    used = np.asarray(cache[0].used)
    assert (used > TOKENS).any(), "nothing forked"

    # Too many tokens under jit: NaN in that row alone, and for good.
    more = np.array([CAPACITY - TOKENS + 1, 1, 0, 1], np.int32)
    wide = np.zeros((ROWS, 6), np.int32)
    logits, cache = extend(restored, cache, wide, more)
    assert np.isnan(logits[0]).any(axis=-1)[: more[0]].all()
    assert np.isfinite(logits[1:][np.arange(6) < more[1:, None]]).all()
    logits, _ = extend(restored, cache, np.zeros((ROWS, 6), np.int32), np.ones(ROWS, np.int32))
    assert np.isnan(np.asarray(logits)[0, 0]).all() and np.isfinite(logits[1:, 0]).all()


def ours(**changes) -> Thoughtbubbles:
    config = ModelConfig(VOCAB, 32, 2, 4, fork_layers=(1,), norm_eps=1e-6, **changes)
    made = jax.jit(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(1)))()
    made.forks[0].score[...] = 30 * made.forks[0].score[...]
    return made


def assert_equal_parallel_and_cached(theirs: Any, model: Thoughtbubbles) -> None:
    """The two decoders on rows padded on the left."""
    tokens = np.random.default_rng(2).integers(0, VOCAB, (ROWS, TOKENS)).astype(np.int32)
    real = np.arange(TOKENS) >= TOKENS - np.array([8, 5, 1, 7])[:, None]

    @jax.jit
    def compute(model, theirs):
        aligned, length, rank = left_align(jnp.asarray(tokens), real)
        cache = theirs.init_cache(ROWS, CAPACITY)
        if isinstance(theirs, module_of("rotary").Decoder):
            found = theirs(aligned, length), theirs.extend(cache, aligned, length)[0]
            found = [restore_alignment(logits, real, rank) for logits in found]
        else:
            found = theirs(tokens, real), theirs.extend(cache, tokens, real)[0]
        return model(tokens, real), *found

    expected, parallel, cached = map(np.asarray, compute(model, theirs))
    np.testing.assert_allclose(parallel[real], expected[real], atol=1e-5)
    np.testing.assert_allclose(cached[real], expected[real], atol=1e-5)


def test_the_rotary_decoder_equals_ours():
    """Same parameters, same logits: the pieces are the whole method."""
    model = ours(
        norm="rmsnorm", mlp="swiglu", mlp_dim=64, biases="none", num_kv_heads=2, head_dim=8
    )
    theirs = jax.jit(lambda: module_of("rotary").Decoder(VOCAB, 32, 2, 4, 2, 8, rngs=nnx.Rngs(0)))()
    theirs.embed.embedding[...] = model.embed[...]
    theirs.norm.scale[...] = model.final_norm.scale[...]
    theirs.fork = model.forks[0]
    for block, layer in zip(theirs.blocks, model.layers(), strict=True):
        block.attention_norm.scale[...] = layer.attention_norm.scale[...]
        block.mlp_norm.scale[...] = layer.mlp_norm.scale[...]
        for name in ("q", "k", "v", "o"):
            getattr(block, name).kernel[...] = getattr(layer.attention, name)[...]
        for name in ("up", "gate", "down"):
            getattr(block, name).kernel[...] = getattr(layer.mlp, name)[...]
    assert_equal_parallel_and_cached(theirs, model)


def test_the_decoder_without_rotary_positions_equals_ours():
    model = ours(nope_layers=(0, 1), policy=PrefixRank(1.5))
    theirs = jax.jit(lambda: module_of("left_padded").GPT2(VOCAB, 32, 32, 2, 4, rngs=nnx.Rngs(0)))()
    theirs.wte.embedding[...], theirs.wpe.embedding[...] = model.embed[...], np.zeros((32, 32))
    theirs.fork = model.forks[0]
    for block, layer in zip(theirs.blocks, model.layers(), strict=True):
        attention = layer.attention
        block.qkv.kernel[...] = np.stack([attention.q[...], attention.k[...], attention.v[...]], 1)
        block.o.kernel[...] = np.asarray(attention.o[...]).reshape(32, 32)
        block.up.kernel[...], block.down.kernel[...] = layer.mlp.up[...], layer.mlp.down[...]
    assert_equal_parallel_and_cached(theirs, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"fork_layers": ()},
        {"policy": PrefixRank(2.0, 3)},
        {"policy": Threshold(2.0), "merge": "probability", "biases": "all", "norm": "layernorm"},
        {"policy": TopK(1.5), "merge": "rightmost"},
    ],
    ids=["plain", "rank", "threshold", "top-k"],
)
def test_promotion_of_ranks_may_be_forbidden(changes):
    """A setting of JAX that users turn on to find mistakes of their own."""
    small = {"vocab_size": 32, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
    config = ModelConfig.preset("tiny", **small, **{"fork_layers": (1,), **changes})
    model = Thoughtbubbles(config, rngs=nnx.Rngs(0))
    tokens, length = jnp.zeros((2, 8), jnp.int32), jnp.array([8, 5])

    def everything(model):
        output = model.run(tokens, length)
        grads = nnx.grad(lambda model: model.log_prob(model.run(tokens, length), tokens).sum())
        found = grads(model), model.logits(output), model.statistics(output)
        if not model.cacheable:
            return found
        _, cache = model.advance(model.init_cache(2, 12), tokens, length, fresh=True)
        return found, model.advance(cache, tokens[:, :2], jnp.array([2, 1]))

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(everything, model)


def test_a_repr_gives_shapes_in_place_of_numbers():
    streams = Streams.start(jnp.ones((4, 128, 64)))
    assert repr(streams).startswith("Streams(x=float32[4,128,64], log_score=float32[4,128], ")
    fork = Fork(64, PrefixRank(2.0), rngs=nnx.Rngs(0))
    assert max(len(repr(value)) for value in (streams, fork.init_cache(4, 128))) < 300
