"""The learner: makes optimizer steps on rollouts with advantages."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.devices.mesh import batch_axes, batch_sharding, place, replicated
from train.engine.state import Trainable, TrainState
from train.engine.step import TrainStep, make_train_step
from train.models.finetunable import FinetunableModel
from train.rl.config import RLConfig
from train.rl.learning.critic import ValueLoss
from train.rl.learning.losses import PolicyLoss
from train.rl.learning.policy import action_mask, scores, scores_and_values
from train.rl.learning.sharing import Branches, branches_of, flat
from train.rl.rollout.rows import Rows
from train.rl.rollout.sampler import Sampling


class Programs(NamedTuple):
    """Jitted functions of a learner, compiled once for each bucket of row counts and row lengths.

    `variables` are all variables of the policy (`TrainState.variables`); `K` is the number of rows,
    `L` their length in tokens.

    Attributes:
        step: Train step `(state, rows) -> (state, metrics)`; the state is donated.
        score: Function `(variables, rows) -> [K, L]` that computes the log-probabilities of
            generated tokens, or of a trigger's decisions where a trigger is trained.
        score_values: Function `(variables, rows) -> ([K, L], [K, L])` that computes
            log-probabilities and values; None for a policy without a value head.
    """

    step: TrainStep
    score: Callable[[Any, Any], jax.Array]
    score_values: Callable[[Any, Any], tuple[jax.Array, jax.Array]] | None = None


class _Same:
    """Cache key whose value is compared by identity."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


@functools.lru_cache(maxsize=32)
def _programs(
    trainable: _Same,
    loss: PolicyLoss,
    value_loss: ValueLoss | None,
    sampling: Sampling,
    max_length: int,
    accumulate: int,
) -> Programs:
    """Make the programs of a `Trainable`; calls with equal arguments return the same programs."""
    of: Trainable = trainable.value

    def policy_loss(
        model: FinetunableModel, rows: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Compute the loss of rows, as a `train.engine.step.Loss`; the PRNG key is not used."""
        del key
        rows, values = flat(rows), None
        if value_loss is None:
            now = scores(model, rows, sampling)
        else:
            now, values = scores_and_values(model, rows, sampling)
        old = jnp.where(rows["first"][:, None], jax.lax.stop_gradient(now), rows["old"])
        loss_mask = action_mask(model, rows)
        common: dict[str, Any] = {
            "valid": rows["valid"], "weight": rows["weight"], "max_length": max_length
        }  # fmt: skip
        total, denominator, sums = loss(
            now,
            old,
            rows["advantages"],
            loss_mask,
            ref_log_probs=rows.get("reference"),
            sampling_log_probs=rows["sampler"] if loss.uses_sampler else None,
            **common,
        )
        if value_loss is not None and values is not None:
            valid_mask = loss_mask & rows["valid"][:, None]
            of_values, more = value_loss(values, rows["values"], rows["returns"], valid_mask)
            total, sums = total + loss.reduce(of_values, valid_mask, **common)[0], sums | more
        return total, denominator, sums

    def scoring(score: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return jax.jit(
            lambda variables, rows: score(of.model(variables), flat(rows), sampling),
            in_shardings=(of.shardings.variables, batch_sharding(of.mesh)),
            out_shardings=replicated(of.mesh),
        )

    return Programs(
        make_train_step(of, accumulate, policy_loss),
        scoring(scores),
        scoring(scores_and_values) if value_loss is not None else None,
    )


class Learner:
    """Policy optimizer, which scores padded rows (`make_rows`) and makes optimizer steps on them.

    Learners of one `Trainable` with equal options share compiled programs.

    Args:
        config: Config of the run.
        trainable: `Trainable` of a `FinetunableModel`.
        sampling: Options that rollouts were sampled with; log-probabilities are computed at the
            same temperature.
        max_length: Maximum number of tokens that the policy can generate in a row.
        share_prompts: Whether equal prompts of a batch are computed once
            (`train.rl.learning.sharing`), where that saves enough work.
    """

    def __init__(
        self,
        config: RLConfig,
        trainable: Trainable,
        sampling: Sampling,
        max_length: int,
        share_prompts: bool = False,
    ):
        self._config, self._trainable, self._share_prompts = config, trainable, share_prompts
        shards = math.prod(trainable.mesh.shape[name] for name in batch_axes(trainable.mesh))
        self._multiple = shards * config.accumulate
        parts = config.parts
        key = (
            _Same(trainable), parts.loss, parts.advantage.value_loss, sampling, max_length,
            config.accumulate,
        )  # fmt: skip
        try:
            hash(key)
        except TypeError:  # a loss with options such as lists: nothing is shared
            self.programs = _programs.__wrapped__(*key)
        else:
            self.programs = _programs(*key)

    def score(self, variables: Any, rows: Rows) -> np.ndarray:
        """Compute log-probabilities of rows, a micro-batch at a time.

        Args:
            variables: Variables of the policy (`TrainState.variables`).
            rows: Rows of `make_rows`.

        Returns:
            Log-probabilities of generated tokens, or of a trigger's decisions where a trigger is
            trained, `[K, L]` float32 for `K` rows of `L` tokens.
        """
        return self._scored(self.programs.score, variables, rows)

    def score_values(self, variables: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Compute log-probabilities of tokens and values of the states before them.

        Args:
            variables: Variables of a policy with a value head (`TrainState.variables`).
            rows: Rows of `make_rows`.

        Returns:
            Log-probabilities and values, `[K, L]` float32 each for `K` rows of `L` tokens.

        Raises:
            FloatingPointError: A value of a trained token is NaN or infinite.
        """
        assert self.programs.score_values is not None
        log_probs, values = self._scored(self.programs.score_values, variables, rows)
        if not np.isfinite(values[rows["trained"]]).all():
            raise FloatingPointError("the value head gives NaN or infinity: it has diverged")
        return log_probs, values

    def _scored(self, program: Callable[[Any, Any], Any], variables: Any, rows: Rows) -> Any:
        # Without these arrays, all calls share one program.
        rows = {name: rows[name] for name in rows if name not in ("old", "reference")}
        branches, width = self._branches(rows, self._config.minibatches), rows["tokens"].shape[1]
        if branches is not None:
            rows = branches.laid_out(rows)
        size = len(rows["valid"]) // (self._config.minibatches * self._config.accumulate)
        parts = []
        for start in range(0, len(rows["valid"]), size):
            part = {name: values[start : start + size] for name, values in rows.items()}
            parts.append(jax.device_get(program(variables, self._placed(part))))
        scored = jax.tree.map(lambda *found: np.concatenate(found), *parts)
        if branches is None:
            return scored
        return jax.tree.map(lambda values: branches.by_row(values, width), scored)

    def _branches(self, rows: Rows, parts: int = 1) -> Branches | None:
        """Return the layout of shared prompts for rows in `parts` minibatches; None without one."""
        if not self._share_prompts:
            return None
        return branches_of(rows, self._multiple * parts, self._config.num_generations or 1)

    def update(
        self, state: TrainState, rows: Rows, rng: np.random.Generator, reference: Any = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Make the optimizer steps of all epochs and minibatches.

        Args:
            state: State before the update; it is donated.
            rows: Rows of `make_rows`, whose number is a multiple of the number of minibatches. The
                array `old`, log-probabilities `[K, L]` under this state, may be missing; it is then
                computed if the update makes several optimizer steps.
            rng: Generator that shuffles rows into minibatches.
            reference: Trained parameters of the reference policy, which shares the frozen
                parameters of the state; None where the loss reads no reference.

        Returns:
            State after the update, and metrics: means of `loss` and `grad_norm` over minibatches,
            the last `learning_rate`, and `sums`, a mapping from name to the loss's sum over all
            minibatches.
        """
        rows = dict(rows)
        if reference is not None:
            variables = dataclasses.replace(state, params=reference).variables
            rows["reference"] = self.score(variables, rows)
        # In the first optimizer step, the old policy is the current policy.
        several = self._config.updates > 1
        if "old" not in rows:
            blank = np.zeros_like(rows["sampler"])
            rows["old"] = self.score(state.variables, rows) if several else blank
        found: list[dict[str, Any]] = []
        for epoch in range(self._config.epochs):
            for number, index in enumerate(_shuffled(rows["valid"], self._config.minibatches, rng)):
                part = {name: values[index] for name, values in rows.items()}
                if not part["valid"].any():  # momentum alone would move parameters
                    continue
                batch = self._minibatch(part, first=epoch == 0 and number == 0)
                state, metrics = self.programs.step(state, batch)
                found.append(metrics)
        found = jax.device_get(found)
        sums = jax.tree.map(lambda *values: np.sum(values, axis=0), *[m["aux"] for m in found])
        return state, {
            "loss": float(np.mean([m["loss"] for m in found])),
            "grad_norm": float(np.mean([m["grad_norm"] for m in found])),
            "learning_rate": float(found[-1]["learning_rate"]),
            "sums": sums,
        }

    def update_flops(self, state: TrainState, rows: Rows) -> float:
        """Count the floating-point operations of an optimizer step on all rows (XLA's count).

        Args:
            state: State before the step; the step is compiled and not run.
            rows: Rows of `make_rows`.

        Returns:
            Number of operations; NaN where XLA gives none.
        """
        rows = {**rows, "old": np.zeros_like(rows["sampler"])}
        compiled = self.programs.step.lower(state, self._minibatch(rows, first=True)).compile()
        return (compiled.cost_analysis() or {}).get("flops", math.nan)

    def _minibatch(self, rows: Rows, first: bool) -> dict[str, jax.Array]:
        """Place the rows of an optimizer step on the devices, with shared prompts if that saves."""
        rows = {**rows, "first": np.full(len(rows["valid"]), first)}
        branches = self._branches(rows)
        return self._placed(rows if branches is None else branches.laid_out(rows))

    def _placed(self, rows: Rows) -> dict[str, jax.Array]:
        return {name: place(values, self._trainable.mesh) for name, values in rows.items()}


def _shuffled(valid: np.ndarray, parts: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle rows into `parts` equal minibatches, with padding rows spread evenly.

    Returns:
        Indices of the rows of each minibatch.
    """
    order = np.concatenate([rng.permutation(np.flatnonzero(valid)), np.flatnonzero(~valid)])
    return [order[part::parts] for part in range(parts)]
