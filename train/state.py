"""TrainState: what moves during training, born sharded."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from thoughtbubbles import ModelConfig, Thoughtbubbles
from thoughtbubbles.layers import Tracked
from train.attention import Attention, attention_on, resolve
from train.mesh import constrain_batch, state_shardings
from train.optim import OptimizerConfig, make_optimizer, make_schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
        step: counter, int32 scalar.
        params: nnx.State of the parameters, all that gradients and the optimizer see.
        opt_state: of the optimizer.
        tracked: nnx.State of the thresholds that follow scores (empty for other policies).
    """

    step: jax.Array
    params: Any
    opt_state: Any
    tracked: Any

    @property
    def weights(self) -> Any:
        """All that a model needs to run: parameters and tracked thresholds in one nnx.State."""
        return nnx.merge_state(self.params, self.tracked)

    def with_weights(self, weights: Any) -> "TrainState":
        params, tracked = nnx.split_state(weights, nnx.Param, Tracked)
        return dataclasses.replace(self, params=params, tracked=tracked)

    @property
    def rest(self) -> "TrainState":
        """The state without its weights: what only training needs."""
        return dataclasses.replace(self, params=(), tracked=())


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The static side of a run: how to build, update and place a `TrainState`.

    Attributes:
        config: of the model.
        graphdef: merges with `TrainState.weights` to the model.
        optimizer, schedule: from optax.
        abstract: a `TrainState` of `jax.ShapeDtypeStruct` with shardings.
        shardings: a `TrainState` of shardings.
        mesh: where it all lives.
        seed: of the initial parameters.
        attention: which one the model runs.
    """

    config: ModelConfig
    graphdef: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState
    shardings: TrainState
    mesh: Mesh
    seed: int
    attention: Attention

    def model(self, weights: Any) -> Thoughtbubbles:
        # Copies of the variables (not of the arrays): tracking must not change the caller's.
        return nnx.merge(self.graphdef, weights, copy=True)

    def init(self) -> TrainState:
        """Initial state, created in place on the mesh; the same numbers on any mesh."""

        def create() -> TrainState:
            model = Thoughtbubbles(self.config, rngs=nnx.Rngs(self.seed))
            _, params, tracked = nnx.split(model, nnx.Param, Tracked)
            return _first_state(self.optimizer, params, tracked)

        return jax.jit(create, out_shardings=self.shardings)()


def make_trainable(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    steps: int,
    mesh: Mesh,
    seed: int = 0,
    attention: Attention = "auto",
) -> Trainable:
    """Everything about a run's state but the numbers; nothing is allocated.

    Raises:
        ValueError: the mesh's devices can't run this `attention` (see `train.attention.resolve`).
    """
    attention = resolve(config, mesh, attention)
    constrain, attend = constrain_batch(mesh), attention_on(mesh, attention)
    model = nnx.eval_shape(
        lambda: Thoughtbubbles(config, rngs=nnx.Rngs(seed), constrain=constrain, attend=attend)
    )
    graphdef, params, tracked = nnx.split(model, nnx.Param, Tracked)
    schedule = make_schedule(optimizer, steps)
    transform = make_optimizer(optimizer, schedule, params)
    abstract = jax.eval_shape(partial(_first_state, transform), params, tracked)
    shardings = state_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    return Trainable(
        config, graphdef, transform, schedule, abstract, shardings, mesh, seed, attention
    )


def _first_state(optimizer: optax.GradientTransformation, params: Any, tracked: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), tracked)
