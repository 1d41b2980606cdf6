"""What users of Flax expect of a module: types, initializers, named axes, a signature."""

import inspect
import pydoc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import memgen
import thoughtbubbles
from memgen import LoRAConfig, MemGen, MemGenConfig, TriggerConfig, WeaverConfig
from thoughtbubbles import Block, Fork, ModelConfig, PrefixRank, Streams, Thoughtbubbles
from thoughtbubbles.hatchling import Hatchling, HatchlingConfig
from thoughtbubbles.module import abstract_module
from thoughtbubbles.stored_parameters import abstract_state
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable

CONFIG = ModelConfig(
    vocab_size=20, embed_dim=8, num_layers=2, num_heads=2, fork_layers=(1,), tied_head=False
)
RULES = [("embed", "fsdp"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor")]
RULES += [(name, None) for name in ("vocab", "head_dim", "candidates", "layers")]


def module_of(name: str, **options: Any) -> Any:
    """One module of each kind, as shapes alone."""

    def made() -> Any:
        rngs = nnx.Rngs(0)
        if name == "fork":
            return Fork(8, PrefixRank(2.0), gate=1.0, rngs=rngs, **options)
        if name == "block":
            return Block(CONFIG, rngs=rngs, **options)
        if name == "hatchling":
            return Hatchling(HatchlingConfig(vocab_size=20, num_neurons=64), rngs=rngs)
        model = Thoughtbubbles(CONFIG, rngs=rngs, **(options if name == "model" else {}))
        if name == "model":
            return model
        lora, reasoner = LoRAConfig(rank=2), model.backbone()
        if name == "weaver":
            return memgen.Weaver(reasoner, reasoner, WeaverConfig(lora=lora), rngs=rngs, **options)
        return memgen.Trigger(reasoner, TriggerConfig(lora=lora), rngs=rngs, **options)

    return nnx.eval_shape(made)


def parameters(module: Any) -> dict[str, Any]:
    """The variables of a module by name, without those of adapters."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    named = {"/".join(map(str, path)): variable for path, variable in flat}
    return {name: variable for name, variable in named.items() if "adapter" not in name}


@pytest.mark.parametrize("name", ["fork", "block", "model", "hatchling", "weaver", "trigger"])
def test_flax_finds_the_names_of_all_axes(name: str):
    module = module_of(name)
    with nnx.logical_axis_rules(RULES):
        mapped = parameters(nnx.get_partition_spec(nnx.state(module, nnx.Param)))
    named = parameters(nnx.get_partition_spec(nnx.state(module, nnx.Param)))
    for path, variable in parameters(module).items():
        assert len(named[path].get_value()) == variable.ndim, path
        split = [axis for axis in mapped[path].get_value() if axis is not None]
        assert len(set(split)) == len(split) and set(split) <= {"fsdp", "tensor"}, path
    specs = {path: variable.get_value() for path, variable in named.items()}
    expected = {
        "fork": ("score", P("embed", "candidates")),
        "block": ("attention/o", P("heads", "head_dim", "embed")),
        "model": ("blocks/mlp/up", P("layers", "embed", "mlp")),
        "hatchling": ("dx", P("embed", "heads", "head_dim")),
        "weaver": ("to_weaver/kernel", P("embed", None)),
        "trigger": ("kernel", P("embed", None)),
    }
    path, spec = expected[name]
    assert specs[path] == spec


def test_a_model_for_decoding_names_the_axes_of_single_blocks():
    model = nnx.eval_shape(lambda: Thoughtbubbles(CONFIG, rngs=nnx.Rngs(0)).for_decoding())
    specs = parameters(nnx.get_partition_spec(nnx.state(model, nnx.Param)))
    assert specs["unstacked/1/mlp/up"].get_value() == P("embed", "mlp")
    assert specs["embed"].get_value() == P("vocab", "embed")


def test_named_axes_need_no_mesh_and_bind_to_none():
    """Under an explicit mesh too, where Flax would shard parameters by names that it has."""
    with jax.set_mesh(jax.make_mesh((2,), ("embed",))):
        fork = Fork(8, rngs=nnx.Rngs(0))
    assert fork.score.get_value().sharding.spec in (P(), P(None, None))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_models_are_described_inside_a_mesh_with_other_names(kind: AxisType):
    """The mesh may have the name of an axis, or not: what shapes alone say has no sharding."""
    for name in ("data", "embed"):
        mesh = jax.make_mesh((2,), (name,), axis_types=(kind,))
        with jax.set_mesh(mesh):
            found = abstract_module(lambda: Fork(8, rngs=nnx.Rngs(0)))
            assert found.score.get_value().sharding is None
            assert CONFIG.num_params() == sum(
                leaf.size for leaf in jax.tree.leaves(abstract_state(CONFIG))
            )
            if name == "data":
                trainable = make_trainable(CONFIG, OptimizerConfig(), 10, mesh)
                state = jax.tree.leaves(trainable.abstract.params)
                assert all(leaf.sharding.is_fully_replicated for leaf in state)


@pytest.mark.parametrize("name", ["fork", "block", "model", "weaver", "trigger"])
def test_parameters_have_the_type_and_values_that_are_asked_for(name: str):
    shapes = []

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        shapes.append(shape)
        return jnp.zeros(shape, dtype)

    made = parameters(module_of(name, param_dtype=jnp.bfloat16, kernel_init=init))
    types = {path: variable.dtype for path, variable in made.items() if "gate" not in path}
    assert set(types.values()) == {jnp.dtype("bfloat16")}
    own = {"fork": {(8, 2)}, "weaver": {(8, 8)}, "trigger": {(8, 2)}}
    blocks = {(8, 8), (8, 32), (32, 8)}  # matrices, whatever the axes of heads
    models = blocks | {(8, 2), (8, 20)}
    assert set(shapes) == own.get(name, models if name == "model" else blocks)


def test_a_fork_layer_of_small_parameters_scores_in_float32():
    def run(x: jax.Array) -> Streams:
        fork = Fork(8, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return fork(Streams.start(x))

    streams = jax.eval_shape(run, jnp.zeros((2, 4, 8), jnp.bfloat16))
    assert (streams.x.dtype, streams.log_score.dtype) == (jnp.float32, jnp.float32)


def test_an_initializer_fills_the_kernel():
    fork = Fork(8, kernel_init=lambda key, shape, dtype: np.full(shape, 0.5), rngs=nnx.Rngs(0))
    assert (np.asarray(fork.score[...]) == 0.5).all()


CLASSES = [
    value
    for package in (thoughtbubbles, memgen)
    for value in (getattr(package, name) for name in package.__all__)
    if inspect.isclass(value)
]
WITHOUT = {"WeaverParam", "TriggerParam"}  # variables of Flax


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_help_gives_the_arguments_of_a_class(kind: type):
    if getattr(kind, "_is_protocol", False) or kind.__name__ in WITHOUT:
        return
    signature = inspect.signature(kind)
    assert "kwargs" not in signature.parameters and "self" not in signature.parameters
    if signature.parameters:
        assert f"{kind.__name__}({next(iter(signature.parameters))}" in pydoc.render_doc(
            kind, renderer=pydoc.plaintext
        )


def test_the_signature_of_a_subclass_is_its_own():
    class Mine(Fork):
        def __init__(self, width: int):
            super().__init__(width, rngs=nnx.Rngs(0))

    assert list(inspect.signature(Mine).parameters) == ["width"]
    assert list(inspect.signature(Mine(8)).parameters) == ["streams", "track", "key"]
    assert inspect.signature(MemGen).parameters["config"].default == MemGenConfig()
