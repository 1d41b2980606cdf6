"""TrainState: what moves during training, born sharded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from thoughtbubbles import ModelConfig, Thoughtbubbles
from train.mesh import constrain_batch, state_shardings
from train.optim import OptimizerConfig, make_optimizer, make_schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Step counter (int32 scalar), parameters (nnx.State) and optimizer state."""

    step: jax.Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The static side of a run: how to build, update and place a `TrainState`.

    Attributes:
        config: of the model.
        graphdef: merges with `TrainState.params` to the model.
        optimizer, schedule: from optax.
        abstract: a `TrainState` of `jax.ShapeDtypeStruct` with shardings.
        shardings: a `TrainState` of shardings.
        mesh: where it all lives.
        seed: of the initial parameters.
    """

    config: ModelConfig
    graphdef: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState
    shardings: TrainState
    mesh: Mesh
    seed: int

    def model(self, params: Any) -> Thoughtbubbles:
        return nnx.merge(self.graphdef, params)

    def init(self) -> TrainState:
        """Initial state, created in place on the mesh; the same numbers on any mesh."""

        def create() -> TrainState:
            model = Thoughtbubbles(self.config, rngs=nnx.Rngs(self.seed))
            params = nnx.state(model, nnx.Param)
            return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

        return jax.jit(create, out_shardings=self.shardings)()


def make_trainable(
    config: ModelConfig, optimizer: OptimizerConfig, steps: int, mesh: Mesh, seed: int = 0
) -> Trainable:
    """Everything about a run's state but the numbers; nothing is allocated."""
    constrain = constrain_batch(mesh)
    model = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(seed), constrain=constrain))
    graphdef, params = nnx.split(model, nnx.Param)
    schedule = make_schedule(optimizer, steps)
    transform = make_optimizer(optimizer, schedule, params)
    abstract = jax.eval_shape(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, transform.init(params)), params
    )
    shardings = state_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    return Trainable(config, graphdef, transform, schedule, abstract, shardings, mesh, seed)
