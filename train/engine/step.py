"""The train step: a pure function from state and batch to new state and metrics, jitted once."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from thoughtbubbles import Architecture
from thoughtbubbles.architecture import Tracked
from train.devices.mesh import batch_sharding, replicated
from train.engine.state import Trainable, TrainState

TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
Loss = Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
"""Function of `(model, batch, key, *constants)`, where `key` is a PRNG key. The function returns
the loss summed over targets, the divisor that makes the sum a mean (such as the number of targets),
and a mapping from name to sum for the metrics."""


def pretraining_loss(
    model: Architecture, rows: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Compute the next-token loss, as a `Loss`, of rows `[B, T + 1]` of token ids.

    The PRNG key gives the noise of the forks, and the model's tracked variables are updated.
    """
    return model.loss(rows, track=True, key=key)


def make_train_step(
    trainable: Trainable,
    accumulate: int = 1,
    loss: Loss = pretraining_loss,
    constants: Sequence[Any] = (),
) -> TrainStep:
    """Make the jitted train step `(state, batch) -> (state, metrics)`, which donates the state.

    Args:
        trainable: Static side of the run's state, from `make_trainable`.
        accumulate: Number of micro-batches in a step. Gradients are summed over all of them and
            divided once by the whole batch's weight, so that the division into micro-batches does
            not change the mean. Each micro-batch updates the tracked variables from their values
            before the step; the step takes the mean of the results, weighted like the loss.
        loss: Loss of a batch, which is a tree of arrays `[B, ...]`. The loss's PRNG key depends on
            seed, step and micro-batch.
        constants: Trees of arrays, the same in every step, that the loss takes as arguments after
            its PRNG key, such as the parameters of a reference model. These arrays keep their
            shardings and are not donated.

    Returns:
        Train step. Its metrics are `loss`, `grad_norm` (before clipping), `learning_rate`, and
        `aux`, the loss's sums and the model's statistics of its tracked variables.
    """

    def gradients(
        state: TrainState, constants: Any, batch: Any, part: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(trainable.seed), state.step)
        key = jax.random.fold_in(key, part)

        def of(params: Any) -> tuple[jax.Array, dict[str, Any]]:
            model = trainable.model(dataclasses.replace(state, params=params).variables)
            total, weight, aux = loss(model, batch, key, *constants)
            moved = jax.tree.map(lambda value: value * weight, nnx.state(model, Tracked))
            return total, {"loss": total, "weight": weight, "aux": aux, "tracked": moved}

        return jax.grad(of, has_aux=True)(state.params)

    def step(state: TrainState, batch: Any, *constants: Any) -> tuple[TrainState, dict[str, Any]]:
        if accumulate == 1:
            grads, sums = gradients(state, constants, batch, jnp.int32(0))
        else:
            grads, sums = _accumulated(partial(gradients, state, constants), batch, accumulate)
        weight = jnp.maximum(sums["weight"], jnp.finfo(jnp.float32).tiny)  # 0 / 0 would be NaN
        grads = jax.tree.map(lambda grad: grad / weight, grads)
        updates, opt_state = trainable.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        tracked = jax.tree.map(
            lambda old, moved: jnp.where(sums["weight"] > 0, moved / weight, old),
            state.tracked,
            sums["tracked"],
        )
        metrics = {
            "loss": sums["loss"] / weight,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(trainable.schedule(state.step), jnp.float32),
            "aux": sums["aux"] | trainable.architecture.tracked_statistics(tracked),
        }
        state = dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, tracked=tracked
        )
        return state, metrics

    everywhere = replicated(trainable.mesh)
    compiled = jax.jit(
        step,
        in_shardings=(
            trainable.shardings,
            batch_sharding(trainable.mesh),
            *(jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in constants),
        ),
        out_shardings=(trainable.shardings, everywhere),
        donate_argnums=0,
    )
    if not constants:
        return compiled
    return lambda state, batch: compiled(state, batch, *constants)


def _accumulated(gradients, batch: Any, parts: int):
    def split(rows: jax.Array) -> jax.Array:
        # Micro-batch `i` takes rows i::parts: each device keeps the rows that it has.
        return rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)

    numbered = jax.tree.map(split, batch), jnp.arange(parts)
    example = jax.eval_shape(gradients, *jax.tree.map(lambda rows: rows[0], numbered))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, gradients(*micro_batch)), None

    return jax.lax.scan(add, zeros, numbered)[0]
