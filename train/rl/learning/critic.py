"""The critic of actor-critic methods: loss, learning rate and metrics of the value head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class ValueLoss:
    """Clipped squared error of values, per token (PPO, arXiv 1707.06347, as in TRL and verl).

    With value V, the value V_old of the parameters that collected the batch, and return R:
    c · ½ max((V - R)², (V_old + clip(V - V_old, -ε, ε) - R)²).

    Attributes:
        clip: Clipping range of a value around V_old (ε), in units of the reward; None for no
            clipping.
        coef: Weight of the loss relative to the policy's loss (c).
    """

    clip: float | None = 0.2
    coef: float = 0.5

    def __post_init__(self):
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"value_clip={self.clip}: choose more than 0, or None")
        if not self.coef > 0:
            raise ValueError(f"value_coef={self.coef}: choose more than 0")

    def __call__(
        self, values: jax.Array, old: jax.Array, returns: jax.Array, loss_mask: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the loss of each token.

        Only `values` gets a gradient. Entries where `loss_mask` is False may be NaN.

        Args:
            values: Value of the state before each token under the parameters being optimised,
                `[K, L]` for `K` rows of `L` tokens.
            old: Value of the state before each token under the parameters that collected the batch,
                `[K, L]`.
            returns: Target of the value: the return from each token on, `[K, L]`.
            loss_mask: Tokens that are trained, `[K, L]` bool.

        Returns:
            Loss of each token, `[K, L]`, 0 outside of the loss mask; and a dict of sums over
            tokens: `value_loss` without the weight c, and `value_clipped`, the number of values
            whose gradient the clip sets to 0.
        """
        known = lambda array: jnp.where(loss_mask, array, 0)  # noqa: E731
        values, old, returns = known(values), known(old), known(returns)
        old, returns = jax.lax.stop_gradient((old, returns))
        plain = clipped = jnp.square(values - returns)
        if self.clip is not None:
            near = old + jnp.clip(values - old, -self.clip, self.clip)
            clipped = jnp.square(near - returns)
        loss = 0.5 * jnp.maximum(plain, clipped)
        sums = {
            "value_loss": loss.sum(),
            "value_clipped": (clipped > plain).sum(dtype=loss.dtype),
        }
        return self.coef * loss, jax.lax.stop_gradient(sums)


def with_value_rate(
    optimizer: optax.GradientTransformation, factor: float
) -> optax.GradientTransformation:
    """Wrap an optimizer so that updates of the value head are multiplied by a factor.

    Args:
        optimizer: Optimizer of the policy and its value head. The wrapper has the same state.
        factor: Factor on the updates of the value head.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params)
        head = jax.tree_util.DictKey("value_head")
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * factor if head in path else leaf, updates
        ), state

    return optax.GradientTransformation(optimizer.init, update)


def value_metrics(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Compute metrics of the value head before an update, over all trained tokens of a step.

    Args:
        rows: Rows of `make_rows` with `values` V and `returns` R.

    Returns:
        The mean `value`, and `explained_variance`, 1 - Var(R - V) / Var(R): 1 for perfect values, 0
        for constant values, negative for worse values; also 0 where the returns do not vary.
    """
    trained = rows["trained"] & rows["valid"][:, None]
    values, returns = (rows[name][trained].astype(np.float64) for name in ("values", "returns"))
    variance = returns.var()
    explained = 1 - (returns - values).var() / variance if variance > 0 else 0.0
    return {"value": float(values.mean()), "explained_variance": float(explained)}
