"""Latent memory with the batch's rows sharded: explicit axes, which are JAX's default, and manual.

Parameters are replicated: nothing is gathered, and each row is what it is on one device.
"""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from memgen_tiny import (
    HATCHLINGS,
    MODELS,
    NEW,
    NOBODY,
    PROMPTS,
    SEEDS,
    VOCAB,
    answer,
    in_numpy,
    memgen_of,
    random_tokens,
    replaced,
    trigger_config,
)

import memgen
from memgen import decoding
from memgen.backbone import check_cache
from memgen.events import WeaverBatchSize
from memgen.placement import embed
from memgen.request import bucket, pad_prompts, row_keys

DEVICES = 2
KINDS = ["explicit", "manual"]
SHARDED = PartitionSpec("rows")
FOUR = [*PROMPTS, PROMPTS[1]]  # the rows of a program that other tests share, and one again


def on_mesh(call: Any, kind: str, made: Any, *rows: Any, devices: int = DEVICES) -> tuple[Any, str]:
    """Result of a call whose rows are sharded over devices, and its program as text."""
    axes = (AxisType.Explicit,)
    mesh = jax.make_mesh((devices,), ("rows",), axis_types=axes, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        rows = jax.device_put(rows, NamedSharding(mesh, SHARDED))
        if kind == "manual":
            specs = (PartitionSpec(), *[SHARDED] * len(rows))
            call = jax.shard_map(call, in_specs=specs, out_specs=SHARDED)
        compiled = jax.jit(call).lower(made, *rows).compile()
        return compiled(made, *rows), compiled.as_text() or ""


def respond(made: memgen.MemGen, tokens: jax.Array, length: jax.Array, keys: jax.Array) -> Any:
    request = memgen.make_request(made, NEW, stop=NOBODY)
    session = memgen.begin(made, tokens, length, keys, tokens.shape[1] + bucket(NEW))
    response, _ = memgen.respond(made, session, request, bucket(NEW))
    names = ("tokens", "log_probs", "decisions", "points", "latents")
    return {name: getattr(response, name) for name in names}


def check_decoding(kind: str, made: memgen.MemGen, devices: int = DEVICES, each: int = 1) -> None:
    prompts = FOUR * (devices // 4 or 1) * each
    rows = (*pad_prompts(prompts, VOCAB), row_keys(0, prompts))
    expected = in_numpy(answer(made))  # draws nothing: equal rows get equal texts
    found, program = on_mesh(respond, kind, made, *rows, devices=devices)
    assert "all-gather" not in program and "all-to-all" not in program
    again = [*range(len(PROMPTS)), 1] * (devices // 4 or 1) * each
    for name, rows in found.items():
        mine = getattr(expected, name)[again]
        np.testing.assert_allclose(rows, mine, atol=1e-5, err_msg=name)
    assert (expected.decisions > 0).any() and (expected.points > 0).any()


@pytest.mark.parametrize("kind", ["explicit", pytest.param("manual", marks=pytest.mark.experiment)])
def test_a_decoding_loop(kind: str, monkeypatch: pytest.MonkeyPatch):
    """As on accelerators: two rows of each device weave together, of which others wait."""
    shards = DEVICES if kind == "explicit" else 1
    monkeypatch.setattr(
        decoding, "weaver_batch_size_for", lambda session: WeaverBatchSize(shards, rows=2)
    )
    check_decoding(kind, memgen_of("shallow"), each=2)


@pytest.mark.experiment
def test_a_decoding_loop_of_groups_of_one():
    check_decoding("explicit", memgen_of("shallow"))


def test_a_decoding_loop_by_hand_is_traced():
    """`shard_map` refuses a loop that doesn't carry what varies as such.

    What comes out: `python -m pytest -n 1 -m experiment tests/test_memgen_axes.py`.
    """
    made, rows = memgen_of("shallow"), (*pad_prompts(FOUR, VOCAB), row_keys(0, FOUR))
    axes = (AxisType.Auto,)
    mesh = jax.make_mesh((DEVICES,), ("rows",), axes, devices=jax.devices()[:DEVICES])
    specs = (PartitionSpec(), *[SHARDED] * len(rows))
    by_hand = jax.shard_map(respond, mesh=mesh, in_specs=specs, out_specs=SHARDED)
    found, expected = (jax.eval_shape(call, made, *rows) for call in (by_hand, respond))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), each) for each in (found, expected)]
    assert shapes[0] == shapes[1]


def linen_memgen() -> memgen.MemGen:
    """The Linen decoder of docs/memory.md, whose memory is woven after each token."""
    page = (Path(__file__).parents[1] / "docs/memory.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "LinenDec" in b]
    names: dict[str, Any] = {}
    exec(block, names)
    made = names["model"]
    made.boundary[...] = np.ones_like(made.boundary[...])
    return made


def read(made: memgen.MemGen, tokens: jax.Array, length: jax.Array, keys: jax.Array) -> jax.Array:
    """States after prompts, by the cache of a session."""
    return memgen.begin(made, tokens, length, keys, tokens.shape[1]).reasoner.hidden


@pytest.mark.experiment
def test_a_linen_decoder_need_not_know_of_axes():
    """It reads prompts into a cache, and is trained; whole responses: the experiment below."""
    made, prompts = linen_memgen(), FOUR * 2
    rows = *pad_prompts(prompts, VOCAB), row_keys(0, prompts)
    found, program = on_mesh(read, "explicit", made, *rows, devices=8)
    np.testing.assert_allclose(found, jax.jit(read)(made, *rows), atol=1e-5)
    forced = [jnp.concatenate([part, part]) for part in TEACHER_FORCED]
    losses_there, trained = on_mesh(losses, "explicit", made, *forced, devices=8)
    np.testing.assert_allclose(losses_there, jax.jit(losses)(made, *forced), atol=1e-5)
    for text in (program, trained):
        assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.experiment
def test_a_linen_decoder_responds():
    check_decoding("explicit", linen_memgen(), devices=8)


@pytest.mark.experiment
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_of_others_need_not_know_of_axes(kind: str):
    check_decoding(kind, memgen_of("foreign"), devices=8)


def eight() -> Any:
    return jax.make_mesh((8,), ("rows",), devices=jax.devices()[:8])


@pytest.mark.parametrize("own", [None, PartitionSpec("rows")])
def test_vectors_are_placed_as_ids_are(own: Any):
    """`nnx.Embed` refuses ids that explicit axes split, and a placement of its own is another."""

    class Decoder(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.table = nnx.Embed(8, 4, rngs=rngs)

        def embed_tokens(self, tokens: jax.Array) -> jax.Array:
            return self.table(tokens, out_sharding=own)

    mesh = eight()
    with jax.set_mesh(mesh):
        decoder = nnx.eval_shape(lambda: Decoder(nnx.Rngs(0)))
        ids = jax.ShapeDtypeStruct((8, 3), jnp.int32, sharding=NamedSharding(mesh, SHARDED))
        for given, spec in ((ids, SHARDED), (jnp.ones((1, 3), jnp.int32), PartitionSpec())):
            found = jax.eval_shape(embed, decoder, given)
            assert found.shape == (*given.shape, 4)
            assert tuple(filter(None, found.sharding.spec)) == tuple(spec)


def test_a_decoder_may_place_its_vectors_by_name():
    class Decoder:
        def embed_tokens(self, tokens: jax.Array) -> jax.Array:
            vectors = (
                jnp.zeros((8, 4)).at[tokens].get(out_sharding=PartitionSpec("rows", None, None))
            )
            return jax.sharding.reshard(vectors, PartitionSpec("rows", None, None))

    mesh = eight()
    with jax.set_mesh(mesh):
        ids = jax.ShapeDtypeStruct((8, 3), jnp.int32, sharding=NamedSharding(mesh, SHARDED))
        found = jax.eval_shape(lambda ids: embed(Decoder(), ids), ids)
    assert found.shape == (8, 3, 4) and tuple(filter(None, found.sharding.spec)) == ("rows",)


def test_a_cache_may_name_the_axis_of_its_rows():
    class Decoder:
        def __init__(self, axis: int):
            self.axis = axis

        def init_cache(self, batch: int, max_len: int) -> jax.Array:
            rows = jnp.zeros((batch, max_len), out_sharding=SHARDED)
            return rows if self.axis == 0 else rows.T

    with jax.set_mesh(eight()):
        check_cache(Decoder(0))
        with pytest.raises(ValueError, match=r"\(8, 16\) for 16 rows and \(8, 24\) for 24, which"):
            check_cache(Decoder(1))


@pytest.mark.experiment
@pytest.mark.parametrize("source", SEEDS)
@pytest.mark.parametrize("backbone", [*MODELS, *HATCHLINGS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_decoding_loop(kind: str, backbone: str, source: str):
    check_decoding(kind, memgen_of(backbone, trigger_config(source)))


def losses(made: memgen.MemGen, tokens: jax.Array, point: jax.Array, kind: jax.Array) -> jax.Array:
    hidden = made.predictors(tokens, memgen.Plan.of(point, kind, made.config))
    return memgen.token_log_probs(made.reasoner, hidden, tokens, tokens > 0)


TEACHER_FORCED = (
    random_tokens(4, 12),
    jnp.array([[3, 6, -1], [2, -1, -1], [4, 8, 10], [1, 5, 9]], jnp.int32),
    jnp.array([[0, 1, 1]] * 4, jnp.int32),
)


def gradients(made: memgen.MemGen, *rows: jax.Array) -> tuple[Any, jax.Array]:
    """Of the weaver, and the losses."""

    def summed(weaver: Any) -> tuple[jax.Array, jax.Array]:
        found = losses(replaced(made, weaver=weaver), *rows)
        return found.sum(), found

    return jax.grad(summed, has_aux=True)(made.weaver)


@functools.cache
def on_one_device() -> tuple[Any, np.ndarray]:
    return in_numpy(jax.jit(gradients)(memgen_of("shallow"), *TEACHER_FORCED))


def test_training_by_hand():
    """`shard_map`, whose gradients are the caller's to sum."""
    found, program = on_mesh(losses, "manual", memgen_of("shallow"), *TEACHER_FORCED)
    np.testing.assert_allclose(found, on_one_device()[1], atol=1e-5)
    assert "all-gather" not in program and "all-to-all" not in program


def test_training_is_that_of_one_device():
    expected, losses = on_one_device()
    found, program = on_mesh(gradients, "explicit", memgen_of("shallow"), *TEACHER_FORCED)
    np.testing.assert_allclose(found[1], losses, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), found[0], expected
    )
    assert "all-gather" not in program and "all-to-all" not in program
    assert max(map(abs_max, jax.tree.leaves(expected))) > 1


IN_SEGMENTS = (
    random_tokens(4, 160),
    jnp.array([[3, 6, 9, 70, 100, 159], [2] + [-1] * 5, [-1] * 6, [8, 158] + [-1] * 4], jnp.int32),
    jnp.array([[0, 1, 1, 1, 1, 1]] * 4, jnp.int32),
)


@pytest.mark.experiment
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_segments(kind: str):
    made = memgen_of("shallow")
    assert made.schedule((4, 160, 6), dropout=False)
    found, program = on_mesh(losses, kind, made, *IN_SEGMENTS)
    np.testing.assert_allclose(found, jax.jit(losses)(made, *IN_SEGMENTS), atol=1e-5)
    assert "all-gather" not in program and "all-to-all" not in program


def abs_max(leaf: jax.Array) -> float:
    return float(np.abs(leaf).max())


@pytest.mark.experiment
def test_prompts_of_a_host_need_nothing():
    """`generate` under a mesh on which nothing is placed yet."""
    made = memgen_of("shallow")
    expected = memgen.generate(made, PROMPTS, NEW, stop=NOBODY)
    mesh = jax.make_mesh((DEVICES,), ("rows",), devices=jax.devices()[:DEVICES])
    with jax.set_mesh(mesh):
        found = memgen.generate(made, PROMPTS, NEW, stop=NOBODY)
    assert found.texts == expected.texts
