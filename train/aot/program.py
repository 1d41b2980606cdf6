"""Programs to compile ahead of time: a run's train step, or a cached decode step."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from thoughtbubbles import ModelConfig
from thoughtbubbles.cache import Cache, decode_step, init_cache
from thoughtbubbles.fork_models import cacheable
from train.devices.attention import Attention
from train.devices.mesh import (
    BATCH_AXES,
    AxisRules,
    batch_sharding,
    check_batch,
    replicated,
    state_shardings,
)
from train.engine.state import Trainable, make_trainable
from train.engine.step import make_train_step
from train.pretraining.config import RunConfig

What = Literal["step", "decode"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, with its abstract arguments and its cost.

    Attributes:
        function: Jitted function, with shardings and donation.
        inputs: Positional arguments of `function`, pytrees of `jax.ShapeDtypeStruct` with
            shardings.
        arguments: Mapping from a purpose ("parameters", "optimizer state", "cache", "batch") to
            the arrays of `inputs` with this purpose, a pytree.
        rewritten: Keys of `arguments` whose arrays each execution reads and completely overwrites.
        flops: Model FLOPs of one execution on the whole mesh: the matrix products of a forward
            pass, or three times as many for a train step.
        recomputed: FLOPs that rematerialisation adds to one execution on the whole mesh.
        tokens: Number of tokens that one execution processes.
    """

    function: Any
    inputs: tuple[Any, ...]
    arguments: dict[str, Any]
    rewritten: tuple[str, ...]
    flops: float
    recomputed: float
    tokens: int

    def lower(self, platform: str) -> jax.stages.Lowered:
        """Lower the function for the platform "tpu" or "cuda"."""
        return self.function.trace(*self.inputs).lower(lowering_platforms=(platform,))


def program_of(config: RunConfig, mesh: Mesh, what: What, attention: Attention) -> Program:
    """Make the program that a run executes at each train step or decode step.

    Args:
        config: Config of the run.
        mesh: Mesh of attached devices, or of descriptions of devices that are not attached.
        what: Kind of program, "step" or "decode".
        attention: Attention kernel.

    Raises:
        ValueError: The batch or a parameter does not divide over the mesh, or `what` is "decode"
            and the model has no decoding cache that can be sharded.
    """
    check_batch(config.batch_size, config.accumulate, mesh)
    trainable = make_trainable(
        config.model, config.optimizer, config.steps, mesh, config.seed, attention
    )
    if what == "decode":
        return _decode(config, trainable)
    return _step(config, trainable)


def _step(config: RunConfig, trainable: Trainable) -> Program:
    state, length = trainable.abstract, config.data.seq_len
    shape = (config.batch_size, length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(trainable.mesh))
    arguments = {
        "parameters": state.params,
        "optimizer state": (state.step, state.opt_state, state.tracked),
        "batch": tokens,
    }
    return Program(
        make_train_step(trainable, config.accumulate),
        (state, tokens),
        arguments,
        ("parameters", "optimizer state"),
        config.step_flops,
        config.batch_size * config.model.recomputed_flops(length),
        config.batch_size * length,
    )


def _decode(config: RunConfig, trainable: Trainable) -> Program:
    """Make the program that decodes one token per row, with a cache of capacity `seq_len` tokens.

    Rows are sharded over `data` and `fsdp`, heads over `tensor`. Parameters are sharded over
    `tensor` alone: parameters sharded over `fsdp` would be gathered for every token.
    """
    mesh, model_config = trainable.mesh, config.model
    if not isinstance(model_config, ModelConfig):
        raise ValueError(
            f"{type(model_config).__name__}: no rule says how its decoding cache is sharded: "
            "compile the step"
        )
    if not cacheable(model_config):
        raise ValueError(
            f"{model_config.policy} can't be decoded with a cache, its choice looks at the whole "
            'row: pass --model.policy "PrefixRank(ratio=2.0)"'
        )
    variables = trainable.abstract.variables
    shardings = state_shardings(variables, mesh, AxisRules(embed=None))
    cache = jax.eval_shape(
        lambda variables: init_cache(
            trainable.model(variables), config.batch_size, config.data.seq_len
        ),
        variables,
    )
    cache_sharding = cache_shardings(cache, mesh)
    token = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)

    def step(variables: Any, cache: Cache, token: jax.Array) -> tuple[jax.Array, Cache]:
        return decode_step(trainable.model(variables), cache, token)

    argument_shardings = (shardings, cache_sharding, batch_sharding(mesh))
    function = jax.jit(
        step,
        in_shardings=argument_shardings,
        out_shardings=(batch_sharding(mesh), cache_sharding),
        donate_argnums=1,
    )
    inputs = tuple(map(_placed, (variables, cache, token), argument_shardings))
    arguments = {"parameters": inputs[0], "cache": inputs[1], "batch": inputs[2]}
    length = config.data.seq_len
    flops = config.batch_size * model_config.forward_flops(length) / length
    return Program(function, inputs, arguments, (), flops, 0.0, config.batch_size)


def cache_shardings(cache: Cache, mesh: Mesh) -> Cache:
    """Return a cache's shardings: rows over `data` and `fsdp`, key/value heads over `tensor`."""
    rows = batch_sharding(mesh)
    heads = NamedSharding(mesh, P(BATCH_AXES, "tensor"))
    shardings = jax.tree.map(lambda leaf: rows if leaf.ndim else replicated(mesh), cache)
    groups = tuple(
        dataclasses.replace(group, key=(heads,) * len(group.key), value=(heads,) * len(group.value))
        for group in shardings.groups
    )
    return dataclasses.replace(shardings, groups=groups)


def _placed(tree: Any, shardings: Any) -> Any:
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    if isinstance(shardings, NamedSharding):
        return place(tree, shardings)
    return jax.tree.map(place, tree, shardings)
