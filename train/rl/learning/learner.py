"""The learner: rollouts that were credited become optimizer steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.devices.mesh import batch_sharding, place, replicated
from train.engine.state import Trainable, TrainState
from train.engine.step import make_train_step
from train.models.finetunable import FinetunableModel
from train.rl.config import RLConfig
from train.rl.learning.policy import action_mask, scores
from train.rl.rollout.rows import Rows
from train.rl.rollout.sampler import Sampling


class Learner:
    """Optimizer steps on rows of `train.rl.rollout.rows.make_rows`.

    One program scores and one updates for each bucket of rows and of lengths.

    Args:
        config: of the method, minibatches and so on.
        trainable: of a `FinetunableModel`.
        how: of the sampler.
        max_length: tokens that the policy can write in a row.
    """

    def __init__(self, config: RLConfig, trainable: Trainable, how: Sampling, max_length: int):
        self._config, self._trainable, self._max_length = config, trainable, max_length
        self._loss = config.parts.loss
        self._how = how
        mesh = trainable.mesh
        self._step = make_train_step(trainable, config.accumulate, self._policy_loss)
        self._score = jax.jit(
            lambda weights, rows: scores(trainable.model(weights), rows, how),
            in_shardings=(trainable.shardings.weights, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )

    def _policy_loss(
        self, finetunable: FinetunableModel, rows: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """`train.engine.step.Loss`; nothing in it is random."""
        del key
        now = scores(finetunable, rows, self._how)
        old = jnp.where(rows["first"][:, None], jax.lax.stop_gradient(now), rows["old"])
        return self._loss(
            now,
            old,
            rows["advantages"],
            action_mask(finetunable, rows),
            valid=rows["valid"],
            weight=rows["weight"],
            max_length=self._max_length,
            reference=rows.get("reference"),
            sampler=rows["sampler"] if self._loss.uses_sampler else None,
        )

    def score(self, weights: Any, rows: Rows) -> np.ndarray:
        """Log-probabilities `[K, L]` float32 of what is trained, part by part of a minibatch."""
        size = len(rows["valid"]) // (self._config.minibatches * self._config.accumulate)
        parts = []
        read = [name for name in rows if name not in ("old", "reference")]  # one program
        for start in range(0, len(rows["valid"]), size):
            part = {name: rows[name][start : start + size] for name in read}
            parts.append(jax.device_get(self._score(weights, self._placed(part))))
        return np.concatenate(parts)

    def update(
        self, state: TrainState, rows: Rows, rng: np.random.Generator, reference: Any = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """All epochs and minibatches; the state is donated.

        Args:
            rows: their number divides by the minibatches.
            rng: shuffles rows.
            reference: trained parameters that a KL holds on to, beside the same frozen ones.

        Returns:
            the state, and the metrics of `make_train_step`: sums of all minibatches, and the last
            one's learning rate.
        """
        rows = dict(rows)
        if reference is not None:
            weights = dataclasses.replace(state, params=reference).weights
            rows["reference"] = self.score(weights, rows)
        # In the first optimizer step nothing has moved: what was is what is.
        several = self._config.updates > 1
        rows["old"] = self.score(state.weights, rows) if several else np.zeros_like(rows["sampler"])
        found: list[dict[str, Any]] = []
        for epoch in range(self._config.epochs):
            for number, index in enumerate(_shuffled(rows["valid"], self._config.minibatches, rng)):
                part = {name: values[index] for name, values in rows.items()}
                part["first"] = np.full(len(index), epoch == 0 and number == 0)
                if not part["valid"].any():  # momentum alone would move parameters
                    continue
                state, metrics = self._step(state, self._placed(part))
                found.append(metrics)
        found = jax.device_get(found)
        sums = jax.tree.map(lambda *values: np.sum(values, axis=0), *[m["aux"] for m in found])
        return state, {
            "loss": float(np.mean([m["loss"] for m in found])),
            "grad_norm": float(np.mean([m["grad_norm"] for m in found])),
            "learning_rate": float(found[-1]["learning_rate"]),
            "sums": sums,
        }

    def _placed(self, rows: Rows) -> dict[str, jax.Array]:
        return {name: place(values, self._trainable.mesh) for name, values in rows.items()}


def _shuffled(valid: np.ndarray, parts: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of each of `parts` equal minibatches; real rows and filler are dealt out evenly."""
    order = np.concatenate([rng.permutation(np.flatnonzero(valid)), np.flatnonzero(~valid)])
    return [order[part::parts] for part in range(parts)]
