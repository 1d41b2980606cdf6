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
from thoughtbubbles import Block, Fork, ModelConfig, PrefixRank, Streams, Thoughtbubbles, hatchling
from thoughtbubbles.hatchling import (
    ForkingHatchling,
    ForkingHatchlingConfig,
    Hatchling,
    HatchlingConfig,
)
from thoughtbubbles.hatchling.state import Frequency
from thoughtbubbles.module import abstract_module
from thoughtbubbles.quantisation import Int8Param, quantise
from thoughtbubbles.stored_parameters import abstract_state
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable

CONFIG = ModelConfig(
    vocab_size=20, embed_dim=8, num_layers=2, num_heads=2, fork_layers=(1,), tied_head=False
)
RULES = [("embed", "fsdp"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor")]
RULES += [(name, None) for name in ("vocab", "head_dim", "candidates", "layers")]

CLASSES = [
    value
    for package in (thoughtbubbles, memgen, hatchling)
    for value in (getattr(package, name) for name in package.__all__)
    if inspect.isclass(value)
]
WITHOUT = {"WeaverParam", "TriggerParam"}  # variables of Flax
ABSTRACT = {"Architecture"}  # whose constructor is its subclasses'
MODULES = [  # all that make parameters
    kind.__name__
    for kind in CLASSES
    if issubclass(kind, nnx.Module) and "rngs" in inspect.signature(kind).parameters
    if kind.__name__ not in ABSTRACT
]

SIZES: dict[str, Any] = {"vocab_size": 20, "embed_dim": 8, "num_neurons": 64}
EXPECTED = {
    "Fork": {"score": P("embed", "candidates")},
    "Block": {"attention/o": P("heads", "head_dim", "embed")},
    "Thoughtbubbles": {"blocks/mlp/up": P("layers", "embed", "mlp")},
    "Hatchling": {"dx": P("embed", "heads", "head_dim"), "frequency": P("heads", "head_dim")},
    "ForkingHatchling": {"forks/0/score": P("embed", "candidates")},
    "Weaver": {"to_weaver/kernel": P("embed", None), "adapter/q/a": P("layers", "embed", None)},
    "Trigger": {"kernel": P("embed", None), "adapter/q/b": P("layers", None, "heads")},
    "MemGen": {"trigger/kernel": P("embed", None), "reasoner/model/embed": P("vocab", "embed")},
    "int8": {
        "blocks/attention/o/values": P("layers", "embed", "heads"),
        "blocks/attention/o/scale": P("layers", "embed"),
        "blocks/mlp/up/values": P("layers", "mlp", "embed"),
        "embed/values": P("vocab", "embed"),
        "head/scale": P("vocab"),
    },
    "adapter": {
        "o/a": P("layers", "heads", None),
        "o/b": P("layers", None, "embed"),
        "k/b": P("layers", None, "kv_heads"),
        "down/a": P("layers", "mlp", None),
        "up/b": P("layers", None, "mlp"),
    },
}


def module_of(name: str, **options: Any) -> Any:
    """One module of each kind, as shapes alone."""

    def made() -> Any:
        rngs = nnx.Rngs(0)
        if name == "Fork":
            return Fork(8, PrefixRank(2.0), gate=1.0, rngs=rngs, **options)
        if name == "Block":
            return Block(CONFIG, rngs=rngs, **options)
        if name == "Hatchling":
            return Hatchling(HatchlingConfig(**SIZES), rngs=rngs, **options)
        if name == "ForkingHatchling":
            return ForkingHatchling(ForkingHatchlingConfig(**SIZES), rngs=rngs, **options)
        model = Thoughtbubbles(CONFIG, rngs=rngs, **(options if name == "Thoughtbubbles" else {}))
        if name == "Thoughtbubbles":
            return model
        if name == "int8":
            return quantise(model)
        if name == "adapter":
            return memgen.make_adapter(model.backbone(), LoRAConfig(2, targets=("*",)), rngs=rngs)
        lora, reasoner = LoRAConfig(rank=2), model.backbone()
        weaver, trigger = WeaverConfig(lora=lora), TriggerConfig(lora=lora)
        if name == "Weaver":
            return memgen.Weaver(reasoner, reasoner, weaver, rngs=rngs, **options)
        if name == "Trigger":
            return memgen.Trigger(reasoner, trigger, rngs=rngs, **options)
        config = MemGenConfig(weaver, trigger)
        return MemGen(reasoner, config, boundary=np.zeros(20), rngs=rngs, **options)

    return nnx.eval_shape(made)


def parameters(module: Any) -> dict[str, Any]:
    """The variables of a module by name, without the table of boundaries."""
    flat = nnx.to_flat_state(nnx.state(module, (nnx.Param, Int8Param, Frequency)))
    return {"/".join(map(str, path)): variable for path, variable in flat}


@pytest.mark.parametrize("name", [*MODULES, "int8", "adapter"])
def test_flax_finds_the_names_of_all_axes(name: str):
    module = module_of(name)
    with nnx.logical_axis_rules(RULES):
        mapped = parameters(nnx.get_partition_spec(nnx.state(module)))
    named = parameters(nnx.get_partition_spec(nnx.state(module)))
    for path, variable in parameters(module).items():
        assert len(named[path].get_value()) == variable.ndim, path
        split = [axis for axis in mapped[path].get_value() if axis is not None]
        assert len(set(split)) == len(split) and set(split) <= {"fsdp", "tensor"}, path
    specs = {path: variable.get_value() for path, variable in named.items()}
    for path, spec in EXPECTED[name].items():
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


@pytest.mark.parametrize("name", MODULES)
def test_parameters_have_the_type_and_values_that_are_asked_for(name: str):
    shapes = []

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        shapes.append(shape)
        return jnp.zeros(shape, dtype)

    made = parameters(module_of(name, param_dtype=jnp.bfloat16, kernel_init=init))
    float32 = ("gate", "adapter", "reasoner", "frequency")
    types = {
        path: variable.dtype
        for path, variable in made.items()
        if not any(part in path for part in float32)
    }
    assert set(types.values()) == {jnp.dtype("bfloat16")}
    blocks = {(8, 8), (8, 32), (32, 8)}  # matrices, whatever the axes of heads
    neurons = {(8, 64), (64, 8), (8, 20)}
    expected = {
        "Fork": {(8, 2)},
        "Block": blocks,
        "Thoughtbubbles": blocks | {(8, 2), (8, 20)},
        "Hatchling": neurons,
        "ForkingHatchling": neurons | {(8, 2)},
        "Weaver": {(8, 8)},
        "Trigger": {(8, 2)},
        "MemGen": {(8, 8), (8, 2)},
    }
    assert set(shapes) == expected[name]


def test_a_fork_layer_of_small_parameters_scores_in_float32():
    def run(x: jax.Array) -> Streams:
        fork = Fork(8, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return fork(Streams.start(x))

    streams = jax.eval_shape(run, jnp.zeros((2, 4, 8), jnp.bfloat16))
    assert (streams.x.dtype, streams.log_score.dtype) == (jnp.float32, jnp.float32)


def test_an_initializer_fills_the_kernel():
    fork = Fork(8, kernel_init=lambda key, shape, dtype: np.full(shape, 0.5), rngs=nnx.Rngs(0))
    assert (np.asarray(fork.score[...]) == 0.5).all()


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
