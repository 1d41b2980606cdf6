"""The models of docs/import.md: decoders of others with fork layers, trained, saved and cached.

Two more are trained by `python -m pytest -m experiment tests/test_import.py`.
"""

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
from jax.sharding import NamedSharding, PartitionSpec

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
SECTIONS = {
    "rotary": "Rotary", "left_padded": "Learned", "linen": "Linen", "explicit": "Explicit"
}  # fmt: skip
ROWS, TOKENS, CAPACITY, VOCAB = 4, 8, 12, 50


def code_of(name: str) -> str:
    page = (ROOT / "docs/import.md").read_text()
    return re.search(rf"## {SECTIONS[name]}.*?```python\n(.*?)```", page, re.DOTALL)[1]


def definitions_of(name: str) -> str:
    """The page's model without the lines at its end that run it."""
    return re.split(r"\n\n\n(?=model|with)", code_of(name))[0]


@functools.cache
def module_of(name: str) -> types.SimpleNamespace:
    values: dict[str, Any] = {}
    exec(compile(definitions_of(name), f"docs/import.md {name}", "exec"), values)
    return types.SimpleNamespace(**values)


class Model(NamedTuple):
    """A page's model as pure functions of its parameters; rows are right-padded here."""

    params: Any
    logits: Callable
    init_cache: Callable  # of the parameters and the number of rows
    extend: Callable


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
            lambda params, rows: model.apply(params, rows, CAPACITY, method="init_cache"),
            lambda params, *given: model.apply(params, *given, method="extend"),
        )
    make = {
        "rotary": lambda rngs: module.Decoder(VOCAB, 32, 2, 4, 2, 8, rngs=rngs),
        "explicit": lambda rngs: module.Decoder(VOCAB, 32, 2, 4, 2, 8, rngs=rngs),
        "left_padded": lambda rngs: module.GPT2(VOCAB, 32, 32, 2, 4, rngs=rngs),
    }[name]
    graph, params = nnx.split(jax.jit(lambda: make(nnx.Rngs(0)))())
    params["fork"]["score"][...] = 30 * np.asarray(params["fork"]["score"][...])

    def given(tokens, length):
        return jnp.arange(tokens.shape[1]) < length[:, None] if name == "left_padded" else length

    return Model(
        params,
        lambda params, tokens, length: nnx.merge(graph, params)(tokens, given(tokens, length)),
        lambda params, rows: nnx.merge(graph, params).init_cache(rows, CAPACITY),
        lambda params, cache, tokens, length: nnx.merge(graph, params).extend(
            cache, tokens, given(tokens, length)
        ),
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_a_model_differs_by_few_lines(name: str):
    unforked = (ROOT / f"tests/unforked/{name}.py").read_text().splitlines()
    forked = definitions_of(name).splitlines()
    changed = [line for line in difflib.ndiff(unforked, forked) if line.startswith("+ ")]
    assert 10 < sum(bool(line[2:].strip()) for line in changed) <= 60


# "explicit", below, is the rotary one with shardings; it and "left_padded" also equal ours, below.
TRAINED = [pytest.param(name, marks=pytest.mark.experiment) for name in ("rotary", "left_padded")]


@pytest.mark.parametrize("name", ["linen", *TRAINED])
def test_a_model_trains_is_saved_and_decodes_as_it_was_trained(name: str, tmp_path: Path):
    model = model_of(name)
    params, expected = train_and_save(model, counting(ROWS), tmp_path)
    check_decoding(model, restored(tmp_path, params), counting(ROWS), expected)


OTHERS = [pytest.param(*p, marks=pytest.mark.experiment) for p in ((8, 2), (8, 8), (2, 2))]


@pytest.mark.parametrize(("trained_on", "decoded_on"), [(2, 8), *OTHERS])
def test_the_explicit_model_trains_on_some_devices_and_decodes_on_others(
    trained_on: int, decoded_on: int, tmp_path: Path
):
    first, second = (
        jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        for devices in (trained_on, decoded_on)
    )
    with jax.set_mesh(first):
        model = model_of("explicit")
        params, expected = train_and_save(model, counting(8), tmp_path, placed)
    with jax.set_mesh(second):
        everywhere = NamedSharding(second, PartitionSpec())
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), params
        )
        check_decoding(model, restored(tmp_path, abstract), counting(8), expected, placed)


def placed(rows: np.ndarray) -> jax.Array:
    """Rows that are split over the mesh around."""
    return jax.device_put(rows, NamedSharding(jax.sharding.get_mesh(), PartitionSpec("data")))


def counting(size: int) -> np.ndarray:
    first = np.random.default_rng(0).integers(0, VOCAB, (size, 1))
    return ((first + np.arange(TOKENS + 1)) % VOCAB).astype(np.int32)


def train_and_save(
    model: Model, rows: np.ndarray, folder: Path, place: Callable = jnp.asarray
) -> tuple[Any, np.ndarray]:
    """Parameters after 30 steps, which the folder holds, and their logits of the rows."""
    optimizer = optax.adam(1e-2)

    def step(params, state, tokens, length, targets):
        def loss(params):
            logits = model.logits(params, tokens, length)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, gradients = jax.value_and_grad(loss, allow_int=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    full = np.full(len(rows), TOKENS, np.int32)
    batch = [place(part) for part in (rows[:, :-1], full, rows[:, 1:])]
    params, state, losses = model.params, jax.jit(optimizer.init)(model.params), []
    step = compiled(step, params, state, *batch)
    for _ in range(30):
        params, state, value = step(params, state, *batch)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2, losses
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
        checkpointer.wait_until_finished()
    jax.tree.map(np.testing.assert_array_equal, params, restored(folder, params))
    return params, np.asarray(compiled(model.logits, params, *batch[:2])(params, *batch[:2]))


def restored(folder: Path, params: Any) -> Any:
    """The folder's parameters, placed as those that are given, which may be abstract."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "params", abstract)


def check_decoding(
    model: Model,
    params: Any,
    rows: np.ndarray,
    expected: np.ndarray,
    place: Callable = jnp.asarray,
) -> None:
    size, rng = len(rows), np.random.default_rng(0)
    cache = model.init_cache(params, size)
    wide, one = np.zeros((size, 6), np.int32), np.ones(size, np.int32)
    extend = compiled(model.extend, params, cache, place(wide), place(one))
    found, done = np.zeros_like(expected), np.zeros(size, np.int32)
    while (done < TOKENS).any():  # parts of 0 to 3 tokens, another number in each row
        part = np.minimum(rng.integers(0, 4, size), TOKENS - done).astype(np.int32)
        at = np.minimum(done[:, None] + np.arange(6), TOKENS - 1)
        logits, cache = extend(params, cache, place(np.take_along_axis(rows, at, 1)), place(part))
        logits = np.asarray(logits)
        for row in range(size):
            found[row, done[row] : done[row] + part[row]] = logits[row, : part[row]]
        done += part
    np.testing.assert_allclose(found, expected, atol=1e-4)
    used = np.asarray(cache[0].used)
    assert (used > TOKENS).any(), "nothing forked"

    # Too many tokens under jit: NaN in that row alone, and for good.
    more = one.copy()
    more[[0, 2]] = CAPACITY - TOKENS + 1, 0
    logits, cache = extend(params, cache, place(wide), place(more))
    logits = np.asarray(logits)
    assert np.isnan(logits[0]).any(axis=-1)[: more[0]].all()
    assert np.isfinite(logits[1:][np.arange(6) < more[1:, None]]).all()
    logits = np.asarray(extend(params, cache, place(wide), place(one))[0])
    assert np.isnan(logits[0, 0]).all() and np.isfinite(logits[1:, 0]).all()


def compiled(call: Callable, *given: Any) -> Callable:
    """A program that takes the results of earlier calls again, and gathers nothing."""
    program = jax.jit(call).lower(*given).compile()
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()
    return program


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
