"""The train step: one pure function, compiled once, on split state."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from thoughtbubbles.layers import Tracked
from train.losses import next_token_loss
from train.mesh import batch_sharding, replicated
from train.state import Trainable, TrainState
from train.statistics import fork_statistics, thresholds

TrainStep = Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, Any]]]


def make_train_step(trainable: Trainable, accumulate: int = 1) -> TrainStep:
    """Jitted `(state, tokens [B, T+1]) -> (state, metrics)`; the state is donated.

    Args:
        trainable: from `make_trainable`.
        accumulate: micro-batches per step. Gradients are sums over targets, divided once by the
            number of targets of the whole batch, so the split changes nothing. Each micro-batch
            moves the tracked thresholds from where the step found them; the step takes the mean,
            weighted by targets.
    """

    def gradients(params: Any, tracked: Any, tokens: jax.Array) -> tuple[Any, dict[str, Any]]:
        def loss(params: Any) -> tuple[jax.Array, dict[str, Any]]:
            model = trainable.model(nnx.merge_state(params, tracked))
            total, (weight, output) = next_token_loss(model, tokens, track=True)
            moved = jax.tree.map(lambda value: value * weight, nnx.state(model, Tracked))
            forks = fork_statistics(output)
            return total, {"loss": total, "weight": weight, "forks": forks, "tracked": moved}

        return jax.grad(loss, has_aux=True)(params)

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, dict[str, Any]]:
        if accumulate == 1:
            grads, sums = gradients(state.params, state.tracked, tokens)
        else:
            of_part = partial(gradients, state.params, state.tracked)
            grads, sums = _accumulated(of_part, tokens, accumulate)
        weight = jnp.maximum(sums["weight"], 1.0)
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
            "forks": sums["forks"] | thresholds(tracked),
        }
        return TrainState(state.step + 1, params, opt_state, tracked), metrics

    everywhere = replicated(trainable.mesh)
    return jax.jit(
        step,
        in_shardings=(trainable.shardings, batch_sharding(trainable.mesh)),
        out_shardings=(trainable.shardings, everywhere),
        donate_argnums=0,
    )


def _accumulated(gradients, tokens: jax.Array, parts: int):
    # Micro-batch `i` takes rows i::parts: each device keeps the rows that it has.
    split = tokens.reshape(tokens.shape[0] // parts, parts, -1).swapaxes(0, 1)
    example = jax.eval_shape(gradients, split[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, gradients(micro_batch)), None

    return jax.lax.scan(add, zeros, split)[0]
