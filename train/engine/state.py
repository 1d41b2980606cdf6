"""TrainState (all arrays of a run) and Trainable (creates a TrainState sharded over a mesh)."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx import filterlib
from jax.sharding import Mesh

from thoughtbubbles import Architecture, ArchitectureConfig
from thoughtbubbles.architecture import Tracked, architecture_of
from thoughtbubbles.module import abstract_module
from train.devices.attention import Attention, attention_on, resolve
from train.devices.mesh import check_entered, check_mesh, constrain_batch, put, state_shardings
from train.engine.optim import OptimizerConfig, make_optimizer, make_schedule

EVERY_PARAMETER: filterlib.Filter = ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All arrays of a run: variables that a step updates, and frozen parameters that it reads.

    Attributes:
        step: Number of updates so far, int32 scalar.
        params: nnx.State of the trained parameters; only these have gradients and optimizer state.
        frozen: nnx.State of all other parameters and of constants, which no step changes.
        opt_state: State of the optimizer.
        tracked: nnx.State of the `Tracked` variables, such as running means, which steps update
            without gradients.
        trained: Filter that selects the trained parameters (static).
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: Any
    tracked: Any
    trained: filterlib.Filter = dataclasses.field(
        default=EVERY_PARAMETER, metadata={"static": True}
    )

    @property
    def variables(self) -> Any:
        """All variables of the model in one nnx.State: trained, frozen and tracked ones."""
        return nnx.merge_state(self.params, self.frozen, self.tracked)

    def with_variables(self, variables: Any) -> "TrainState":
        params, frozen, tracked = nnx.split_state(variables, *_parts(self.trained))
        return dataclasses.replace(self, params=params, frozen=frozen, tracked=tracked)

    @property
    def rest(self) -> "TrainState":
        """This state without the model's variables: step and optimizer state."""
        return dataclasses.replace(self, params=(), frozen=(), tracked=())


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The static side of a run: how to build, update and place a `TrainState`.

    Attributes:
        config: Config of the decoder; the config's class determines the architecture
            (`ARCHITECTURES`).
        graphdef: Graph definition that merges with `TrainState.variables` into the decoder, or into
            the module that `wrap` of `make_trainable` builds around it.
        optimizer: Gradient transformation.
        schedule: Learning rate by step.
        abstract: `TrainState` of `jax.ShapeDtypeStruct`s with shardings.
        shardings: `TrainState` of shardings.
        mesh: Mesh of the run's devices.
        seed: Seed of the initial parameters.
        attention: Implementation of attention that the model runs, never "auto".
    """

    config: ArchitectureConfig
    graphdef: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState
    shardings: TrainState
    mesh: Mesh
    seed: int
    attention: Attention

    @property
    def architecture(self) -> type[Architecture]:
        """Class of the decoder."""
        return architecture_of(self.config)

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))

    def model(self, variables: Any) -> Any:
        check_entered(self.mesh)
        # Copies of the variables (not of the arrays): tracking must not change the caller's.
        return nnx.merge(self.graphdef, variables, copy=True)

    def init(self) -> TrainState:
        """Create the random initial state directly on the mesh, with equal values on any mesh."""

        def create() -> TrainState:
            model = self.architecture(self.config, rngs=nnx.Rngs(self.seed))
            return _first_state(self.optimizer, nnx.state(model), self.abstract.trained)

        return jax.jit(create, out_shardings=self.shardings)()

    def init_from(self, params: Mapping[Any, Any]) -> TrainState:
        """Create the initial state from given parameters of the decoder, placed on the mesh.

        Args:
            params: Nested dict of arrays, as `nnx.to_pure_dict` returns it. Arrays that already
                have the run's sharding are not copied, and the first train step donates them.

        Raises:
            ValueError: Names or shapes differ from those of the decoder's parameters.
        """
        return self.start(nnx.state(self.architecture.from_params(self.config, params)))

    def start(self, variables: Any) -> TrainState:
        """Create the initial state from given values of all variables, placed on the mesh.

        Args:
            variables: nnx.State of all variables, as `TrainState.variables`. Arrays that already
                have the run's sharding are not copied, and the first train step donates them.
        """
        state = put(variables, self.shardings.variables)
        # Parameters stay the arrays that they are; the rest is new.
        rest = jax.jit(
            lambda: _first_state(self.optimizer, state, self.abstract.trained).rest,
            out_shardings=self.shardings.rest,
        )()
        return rest.with_variables(state)


def make_trainable(
    config: ArchitectureConfig,
    optimizer: OptimizerConfig,
    steps: int,
    mesh: Mesh,
    seed: int = 0,
    attention: Attention = "auto",
    trained: filterlib.Filter = EVERY_PARAMETER,
    wrap: Callable[[Any], nnx.Module] | None = None,
) -> Trainable:
    """Make the static side of a run: shapes, shardings and updates of its state, without arrays.

    Args:
        config: Config of the decoder.
        optimizer: Optimizer and schedule.
        steps: Number of steps of the schedule.
        mesh: Mesh that the state is sharded over, with axes named `data`, `fsdp` or `tensor`, as
            `make_mesh` makes it. With explicit axes, the default of `jax.make_mesh`, only the batch
            can be split, and steps must be called inside `jax.set_mesh(mesh)`.
        seed: Seed of the initial parameters and of the noise of training.
        attention: Implementation of attention (`train.devices.attention.resolve`).
        trained: Flax filter of the trained parameters, e.g. `nnx.PathContains("forks")` or a
            predicate of path and variable. All other parameters are frozen: they have neither
            gradients nor optimizer state.
        wrap: Function from the decoder to a module around it that is trained in its place, such as
            one with an adapter; None trains the decoder itself.

    Raises:
        ValueError: The mesh's devices can't run this `attention`
            (`train.devices.attention.resolve`), an axis of the mesh has another name, an explicit
            axis would split parameters, or no parameter is trained.
    """
    check_mesh(mesh)
    attention = resolve(config, mesh, attention)
    constrain, attend = constrain_batch(mesh), attention_on(mesh, attention)

    def build() -> nnx.Module:
        model = architecture_of(config)(
            config, rngs=nnx.Rngs(seed), constrain=constrain, attend=attend
        )
        return model if wrap is None else wrap(model)

    graphdef, variables = nnx.split(abstract_module(build))
    params, _, _ = nnx.split_state(variables, *_parts(trained))
    if not params:
        raise ValueError(f"trained={trained}: the model has no such parameter, none would move")
    schedule = make_schedule(optimizer, steps)
    transform = make_optimizer(optimizer, schedule, params)
    abstract = jax.eval_shape(partial(_first_state, transform, trained=trained), variables)
    shardings = state_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    return Trainable(
        config, graphdef, transform, schedule, abstract, shardings, mesh, seed, attention
    )


def _first_state(
    optimizer: optax.GradientTransformation, variables: Any, trained: filterlib.Filter
) -> TrainState:
    params, frozen, tracked = nnx.split_state(variables, *_parts(trained))
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, frozen, optimizer.init(params), tracked, trained)


def _parts(trained: filterlib.Filter) -> tuple[filterlib.Filter, ...]:
    """Return filters of the trained parameters, of all frozen variables, and of `Tracked` ones."""
    return nnx.All(nnx.Param, trained), nnx.Not(Tracked), Tracked


def resolved(trainable: Trainable) -> dict[str, Any]:
    """Return the actual mesh sizes and attention of a run, where its options were -1 or "auto".

    Returns:
        JSON-serializable dict with `mesh` (mapping from axis name to size) and `attention` (name).
    """
    return {"mesh": dict(trainable.mesh.shape), "attention": trainable.attention}
