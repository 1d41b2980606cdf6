"""Optimizers and learning-rate schedules: AdamW and Muon from optax.

A parameter's metadata (`inputs`, `axes`) decide whether weight decay acts on the parameter, and
whether Muon updates it.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

Name = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with a learning-rate schedule.

    With "muon", the updates of hidden matrices are orthogonalised. All other parameters (embedding,
    head, norms, biases, fork vectors and scores) take AdamW at the same learning rate. Muon's
    updates are scaled to the size of AdamW's, so that learning rates carry over (arXiv 2502.16982).
    Weight decay acts on all matrices with "adamw", and on orthogonalised matrices with "muon".

    Attributes:
        name: Optimizer: "adamw", or "muon" for hidden matrices with AdamW for other parameters.
        learning_rate: Peak learning rate, reached after the warm-up.
        b1: Decay rate of the first moment of AdamW (β1).
        b2: Decay rate of the second moment of AdamW (β2).
        eps: Term added to the denominator of AdamW (ε).
        weight_decay: Coefficient of the decoupled weight decay of matrices, multiplied by the
            learning rate.
        clip: Maximum global norm of the gradient; a gradient with a larger norm is scaled down to
            this norm, and "inf" turns clipping off.
        schedule: Schedule after the warm-up: "cosine" decays towards `final_ratio` of the peak over
            the rest of the run; "wsd" (warm-up, stable, decay) stays at the peak, and decays
            linearly towards `final_ratio` of it over the last `decay` fraction of the steps.
        warmup: Fraction of the steps, 0 to 1, over which the learning rate rises linearly from 0,
            at least over the first step; 0 turns the warm-up off.
        decay: Fraction of the steps, 0 to 1, over which "wsd" decays at the end.
        final_ratio: Learning rate that the decay reaches behind the last step, as in optax, as a
            fraction of the peak; the last step itself is one step of the decay short of it.
        fork_rate: Factor on the learning rate of fork layers. A factor above 1 helps new fork
            layers in a pretrained model to catch up.
    """

    may_be_infinite: ClassVar[frozenset[str]] = frozenset({"clip"})

    name: Name = "adamw"
    learning_rate: float = 3e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final_ratio: float = 0.1
    fork_rate: float = 1.0

    def __post_init__(self):
        for name, choices in (("name", get_args(Name)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        for name in ("warmup", "decay", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a share: choose 0 to 1")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip} is not positive: choose a norm, or inf for none")
        for name in ("learning_rate", "eps", "fork_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not positive and finite")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose from 0 to below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: choose a number, 0 or more")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup={self.warmup} and decay={self.decay} exceed the run: "
                "their sum must be at most 1"
            )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule of `config`: a function from a step, from 0 on, to its learning rate.

    Warm-up and decay are rounded to whole steps; the decay gives way to the warm-up where both
    together would be longer than the run.

    Args:
        config: Optimizer and schedule.
        steps: Number of steps of the run.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_ratio
    warmup = max(round(config.warmup * steps), 1) if config.warmup else 0
    if config.schedule == "cosine":
        if not warmup:
            return optax.cosine_decay_schedule(peak, steps, config.final_ratio)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final)
    decay = max(min(round(config.decay * steps), steps - warmup), 1)
    parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
    ends = [max(steps - decay, warmup)]
    if warmup:
        parts, ends = [optax.linear_schedule(0.0, peak, warmup), *parts], [warmup, *ends]
    return optax.join_schedules(parts, ends)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, params: Any
) -> optax.GradientTransformation:
    """Make the optimizer: gradient clipping, AdamW or Muon, and the factor on fork layers.

    Args:
        config: Optimizer and its options.
        schedule: Learning rate by step.
        params: nnx.State of the trained parameters, real or abstract; each parameter's metadata
            decide whether weight decay acts on the parameter and whether Muon updates it.
    """
    if config.name == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=map_variables(muon_dimensions, params),
            consistent_rms=0.2,
        )
    else:
        decayed = map_variables(is_matrix, params)
        optimizer = optax.adamw(
            schedule,
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    clip = optax.identity() if math.isinf(config.clip) else optax.clip_by_global_norm(config.clip)
    parts = [clip, optimizer]
    if config.fork_rate != 1:
        parts.append(optax.masked(optax.scale(config.fork_rate), in_forks))
    return optax.chain(*parts)


def in_forks(params: Any) -> Any:
    """Return a tree like `params` that says whether each parameter belongs to a fork layer."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.DictKey("forks") in path, params
    )


def is_matrix(variable: nnx.Variable) -> bool:
    """Whether a variable is a matrix, on which weight decay acts, and not a vector or a bias."""
    return _inputs(variable) > 0


def _inputs(variable: nnx.Variable) -> int:
    """Number of leading axes that a product contracts; by default 1 of a matrix, 0 of a vector."""
    return variable.get_metadata().get("inputs", int(variable.get_value().ndim > 1))


def muon_dimensions(variable: nnx.Variable) -> MuonDimensionNumbers | None:
    """Return the input and output axes of a matrix for Muon, or None if the variable takes AdamW.

    Unnamed leading axes, of stacked layers, are neither input nor output axes, but a batch of
    matrices.
    """
    inputs = _inputs(variable)
    axes = variable.get_metadata().get("axes", (None,) * (inputs + 1))  # an adapter's matrix
    if inputs == 0 or "vocab" in axes or "candidates" in axes:
        return None
    first = len(variable.get_value().shape) - len(axes)
    dims = tuple(range(first, first + len(axes)))
    return MuonDimensionNumbers(dims[:inputs], dims[inputs:])


def map_variables(function, params: Any) -> Any:
    """Return a tree like `params` with `function(variable)` in place of each variable's value."""
    return jax.tree.map(
        lambda variable: jax.tree.map(lambda _: function(variable), variable),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
