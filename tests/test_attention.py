"""Attention kernels: numerics, whole models, meshes, and compilation for TPUs that aren't there."""

import dataclasses
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import quick_model, random_tokens

from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles
from thoughtbubbles.attention import Attend, attend, attend_reference
from thoughtbubbles.kernels import attend_cudnn, attend_splash, splash_block
from thoughtbubbles.recompute import once_known
from train.devices.attention import Attention, on_mesh, resolve
from train.devices.hardware import libtpu_without_tpus
from train.devices.mesh import (
    BATCH_AXES,
    MeshConfig,
    batch_sharding,
    constrain_batch,
    make_mesh,
    replicated,
    state_shardings,
)
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step

KERNELS = {
    "splash": partial(attend_splash, interpret=True),
    "cudnn": partial(attend_cudnn, implementation="xla"),
}
SHAPES = {  # batch, slots, heads, heads of keys, width, whether there is a bias
    "one slot": (2, 1, 2, 2, 8, True),
    "one head of keys": (2, 150, 4, 1, 64, True),
    "wide": (1, 300, 2, 2, 128, True),
    "blocks": (2, 600, 2, 1, 32, True),
    "no bias": (2, 200, 2, 2, 32, False),
}
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")
TINY = ModelConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    fork_layers=(0,),
    policy=PrefixRank(1.5),
    score_originals=True,
    scan_layers=True,
)
COPIES = dataclasses.replace(TINY, fork_layers=(), copies=2, merge="rightmost")
TWO_GROUPS = dataclasses.replace(TINY, fork_layers=(1,), remat="full")


def inputs(batch, slots, heads, kv_heads, width, biased, dtype=jnp.float32):
    """Query, key, value, bias, and a cotangent; the scores are low, as deep streams' are."""
    rng = np.random.default_rng(slots)

    def draw(heads):
        return jnp.asarray(rng.normal(size=(batch, slots, heads, width)), dtype)

    query, key, value, cotangent = map(draw, (heads, kv_heads, kv_heads, heads))
    bias = np.float32(-20 + 3 * rng.normal(size=(batch, slots))) if biased else None
    return (query, key, value, bias), cotangent


@partial(jax.jit, static_argnums=0)
def with_gradients(function, args, cotangent):
    out, pull = jax.vjp(function, *args)
    return out, *pull(cotangent.astype(out.dtype))


def assert_near(ours, theirs, tolerance):
    """Largest error of each array against its largest entry, or 0.1 where all are smaller."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(0.1, np.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [*((jnp.float32, shape) for shape in SHAPES), (jnp.bfloat16, "one head of keys")]
    + [pytest.param(jnp.bfloat16, "wide", marks=pytest.mark.experiment)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_the_reference(kernel, dtype, shape):
    args, cotangent = inputs(*SHAPES[shape], dtype=dtype)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (args, cotangent))
    ours = with_gradients(KERNELS[kernel], args, cotangent)
    assert ours[0].dtype == dtype
    assert args[3] is None or ours[4].dtype == jnp.float32
    assert_near(
        ours, with_gradients(attend_reference, *exact), 1e-5 if dtype == jnp.float32 else 1e-2
    )


def test_splash_blocks_pad_little():
    assert [splash_block(slots) for slots in (1, 128, 129, 300, 512, 4096)] == [
        *(128, 128, 256, 384, 512, 512)
    ]
    assert all(-slots % splash_block(slots) < 256 for slots in range(1, 20_000))


@jax.jit
def logits_and_gradients(model, tokens):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(tokens)
        return jnp.sin(logits).sum(), logits

    gradients, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradients


def hooked(config, **hooks):
    """The model of `quick_model` with another attention."""
    params = nnx.to_pure_dict(nnx.state(quick_model(config)))
    return Thoughtbubbles.from_params(config, params, **hooks)


def test_a_model_without_a_bias_is_the_same_with_the_kernel():
    config = dataclasses.replace(COPIES, num_layers=1, scan_layers=False, remat="dots")
    tokens = random_tokens(2, 12)
    ours = logits_and_gradients(hooked(config, attend=KERNELS["splash"]), tokens)
    assert_near(ours, logits_and_gradients(quick_model(config), tokens), 1e-5)


def test_the_kernel_gets_a_bias_only_where_keys_have_one():
    seen = []

    def recording(query, key, value, bias):
        seen.append(bias is not None)
        return attend(query, key, value, bias)

    for config, expected in (
        (TWO_GROUPS, [False, True]),
        (dataclasses.replace(TWO_GROUPS, key_bias=False), [False, False]),
        (COPIES, [False]),
    ):
        seen.clear()
        jax.eval_shape(hooked(config, attend=recording).run, random_tokens(1, 6))
        assert seen == expected


def test_a_model_is_the_same_with_the_kernel_on_a_mesh():
    config = dataclasses.replace(TINY, num_layers=1, scan_layers=False, remat="dots")
    tokens, mesh = random_tokens(4, 12), make_mesh(MeshConfig(2, 2, 2))
    hooks = {"attend": on_mesh(KERNELS["splash"], mesh), "constrain": constrain_batch(mesh)}
    graphdef, state = nnx.split(hooked(config, **hooks))
    state = jax.device_put(state, state_shardings(state, mesh))
    ours = logits_and_gradients(
        nnx.merge(graphdef, state), jax.device_put(tokens, batch_sharding(mesh))
    )
    assert_near(ours, logits_and_gradients(quick_model(config), tokens), 1e-5)


def test_a_batch_of_no_rows_attends_to_nothing():
    x = jnp.zeros((0, 200, 2, 8))
    assert attend(x, x, x).shape == x.shape


def test_a_broken_row_stays_alone():
    """A token outside the vocabulary makes its row NaN, and no other."""
    tokens = np.array(random_tokens(2, 12))
    tokens[0, 3] = TINY.vocab_size
    logits = jax.jit(hooked(TINY, attend=KERNELS["splash"]))(tokens)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_devices_exchange_nothing_but_the_gradient_of_the_bias(kernel):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    heads = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, "tensor"))
    function = on_mesh(KERNELS[kernel], mesh)

    def collectives(biased):
        args, cotangent = inputs(4, 20, 4, 2, 8, biased)
        rows = batch_sharding(mesh) if biased else None
        jitted = jax.jit(
            partial(with_gradients, function), in_shardings=((heads, heads, heads, rows), heads)
        )
        return set(COLLECTIVE.findall(jitted.lower(args, cotangent).compile().as_text()))

    assert collectives(biased=False) == set()
    assert collectives(biased=True) == {"all-reduce"}


def test_attention_is_chosen_by_platform():
    cpus = make_mesh(MeshConfig())
    assert make_trainable(TINY, OptimizerConfig(), 1, cpus).attention == "xla"
    assert resolve(TINY, cpus, "xla") == "xla"
    with pytest.raises(ValueError, match="attention='splash' runs on tpu devices and the mesh has"):
        resolve(TINY, cpus, "splash")
    with pytest.raises(ValueError, match="attention='flash': choose one of auto, xla, splash"):
        resolve(TINY, cpus, cast(Any, "flash"))
    with pytest.raises(ValueError, match="attention='cudnn' runs on gpu devices and the mesh has"):
        make_trainable(TINY, OptimizerConfig(), 1, cpus, attention="cudnn")


def test_cudnn_is_chosen_where_it_can_run(monkeypatch):
    gpus = cast(Mesh, SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")])))
    assert resolve(TINY, gpus, "auto") == "xla", "cuDNN has no float32"
    with pytest.raises(ValueError, match="attention='cudnn' can't run this model: .*: choose xla"):
        resolve(TINY, gpus, "cudnn")
    monkeypatch.setattr("train.devices.attention.attend_cudnn", KERNELS["cudnn"])
    assert resolve(TINY, gpus, "auto") == resolve(TINY, gpus, "cudnn") == "cudnn"


@pytest.fixture(scope="module")
def tpus():
    """Devices of a TPU slice by name, for compiling only."""
    pytest.importorskip("libtpu", reason="needs the extra tpu: libtpu compiles without a TPU")
    libtpu_without_tpus()
    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices


TPU_CALL = 'custom_call_target="tpu_custom_call"'
CUDNN = "jax._src.cudnn.fused_attention_stablehlo"
QUICK: Any = {"exec_time_optimization_effort": -1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("v5e:2x4", (2, 200, 4, 2, 64, True), marks=pytest.mark.experiment),
        pytest.param("v5p:2x2x1", (1, 600, 2, 2, 128, True), marks=pytest.mark.experiment),
        pytest.param("v6e:2x4", (1, 300, 2, 1, 32, True), marks=pytest.mark.experiment),
    ],
)
def test_the_kernel_compiles_for_tpus(tpus, name, shape):
    """Forward, gradient of queries, gradient of keys and values: three kernels."""
    mesh = make_mesh(MeshConfig(), tpus(name)[:1])
    args, cotangent = jax.eval_shape(partial(inputs, *shape, jnp.bfloat16))
    jitted = jax.jit(partial(with_gradients, attend_splash), in_shardings=replicated(mesh))
    assert jitted.lower(args, cotangent).compile().as_text().count(TPU_CALL) == 3


def recomputing(attend: Attend):
    """Gradients of models whose blocks run the same kernel, and their arguments.

    A single block and a scan of two with `remat="dots"`, and a scan of two with `remat="full"`.
    """
    small = ModelConfig(128, 128, num_layers=1, num_heads=1, mlp_dim=128, dtype="bfloat16")
    scanned = dataclasses.replace(small, num_layers=2, scan_layers=True)
    models = []
    for config, remat in ((small, "dots"), (scanned, "dots"), (scanned, "full")):
        config = dataclasses.replace(config, remat=remat, norm="rmsnorm", biases="none")
        make = partial(Thoughtbubbles, config, attend=attend)
        models.append(nnx.split(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))))

    def loss(states):
        streams = [
            nnx.merge(graphdef, state).run(jnp.zeros((1, 128), jnp.int32)).streams.x
            for (graphdef, _), state in zip(models, states, strict=True)
        ]
        return jnp.square(jnp.stack(streams).astype(jnp.float32)).sum()

    return jax.grad(loss), [state for _, state in models]


# A program for chips that aren't here is cached, and can't be read back.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_only_full_recomputation_runs_the_forward_kernel_again(tpus):
    mesh = make_mesh(MeshConfig(), tpus("v5e:2x4")[:1])
    gradients, states = recomputing(attend_splash)
    lowered = jax.jit(gradients, in_shardings=replicated(mesh)).lower(states)
    program = lowered.compile(compiler_options=QUICK).as_text()
    calls = re.findall(rf"%splash_mha_([a-z]+)\S* = .*{TPU_CALL}", program)
    assert Counter(calls) == {"fwd": 1 + 1 + 2, "dq": 3, "dkv": 3}


def test_only_full_recomputation_runs_the_forward_call_of_cudnn_again(monkeypatch):
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91000)
    gradients, states = recomputing(attend_cudnn)
    traced = str(jax.make_jaxpr(gradients)(states))
    calls = re.findall(r"= dot_product_attention_([a-z]+)", traced)
    assert Counter(calls) == {"fwd": 1 + 1 + 2, "bwd": 3}


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_output_of_a_kernel_is_stored_in_one_layout(monkeypatch, tensor):
    """Unless it depends on the gradient, XLA stores its transpose of the forward pass as well."""
    seen = []

    def recording(values, gradient):
        seen.append(values.shape)
        return once_known(values, gradient)

    monkeypatch.setattr("thoughtbubbles.recompute.once_known", recording)
    config = dataclasses.replace(TINY, num_layers=1, scan_layers=False, remat="dots")
    mesh = make_mesh(MeshConfig(1, 1, tensor), jax.devices()[:tensor])
    model = hooked(config, attend=on_mesh(KERNELS["splash"], mesh))
    jax.eval_shape(logits_and_gradients, model, random_tokens(2, 12))
    assert (2 * tensor, 4 // tensor, 128, 4) in seen


def sharded_step(tpus, attention: Attention):
    """The lowered train step of two scanned groups of blocks on eight chips."""
    mesh = make_mesh(MeshConfig(2, 2, 2), tpus("v5e:2x4"))
    size = {"embed_dim": 128, "vocab_size": 256, "dtype": "bfloat16"}
    config = dataclasses.replace(TWO_GROUPS, **size)
    trainable = make_trainable(config, OptimizerConfig(), 10, mesh, attention=attention)
    tokens = jax.ShapeDtypeStruct((8, 257), jnp.int32)
    return trainable, make_train_step(trainable).lower(trainable.abstract, tokens)


def test_a_sharded_step_has_the_kernel_for_tpus(tpus):
    trainable, lowered = sharded_step(tpus, "auto")
    assert trainable.attention == "splash" and "tpu_custom_call" in lowered.as_text()
    assert "tpu_custom_call" not in sharded_step(tpus, "xla")[1].as_text()


@pytest.mark.experiment
def test_a_sharded_step_runs_the_kernel_on_tpus(tpus):
    """Compiled: `python -m pytest -m experiment tests/test_attention.py`, 20 seconds."""
    _, lowered = sharded_step(tpus, "auto")
    # In each of the two scans: forward, again in the backward pass, and the two gradients.
    assert lowered.compile(compiler_options=QUICK).as_text().count(TPU_CALL) == 8
