"""Grow a Dragon Hatchling by copying neurons; merge several models by concatenating neurons."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from thoughtbubbles.checks import check_sizes
from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.hatchling.model import Hatchling
from thoughtbubbles.short_repr import ShortRepr

ANGLES = (15, 40)
"""Range in degrees from which the angle φ of two copies is sampled. At 45°, the gradients of the
two copies would always be equal; near 0°, one copy would be almost inactive."""

NEURON_AXES = {"dx": (1, 2), "dy": (1, 2), "e": (0, 1), "frequency": (0, 1)}
"""Mapping from array name to the axis of heads and the axis of a head's neurons in the array."""


@dataclasses.dataclass(frozen=True, repr=False)
class Growth(ShortRepr):
    """A plan of growth: the neuron that each neuron of the grown model copies, and its factor.

    A neuron x = (v Dx)₊ affects the output only through two products: x·x in attention, and x·E in
    the output of the layer. So if the Dx and E of several copies are scaled by factors whose
    squares sum to 1, such as cos φ and sin φ, the copies together compute the same as the original
    neuron, in both forms of the model. All copies have the frequency and Dy of the original. The
    gradient of a copy's Dy is the original's gradient times the squared factor, so copies with
    different factors diverge in training.

    Attributes:
        source: Index, within its head, of the neuron that each neuron of the grown model copies,
            `[H, N']` int; N' is the number of neurons of a head of the grown model.
        share: Factor by which the Dx and E of each copy are scaled, `[H, N']` float64.
    """

    source: np.ndarray
    share: np.ndarray

    def parameter(self, name: str, value: Any) -> Any:
        """Return the grown model's value of a parameter or constant.

        Args:
            name: Name of the array in the model. Arrays not named in `NEURON_AXES` are returned
                unchanged.
            value: Array of the smaller model; the result has its dtype.
        """
        return self._copied(name, value, 1 if name in ("dx", "e") else 0)

    def gradient(self, name: str, value: Any, power: int = 1) -> Any:
        """Convert a gradient or an optimizer moment from the smaller model to the grown model.

        Args:
            name: Name of the parameter.
            value: Gradient of the smaller model, or a running mean of powers of the gradient.
            power: Exponent of the gradient in `value`: 1 for a gradient or a first moment, 2 for
                Adam's second moment.
        """
        return self._copied(name, value, power * (2 if name == "dy" else 1))

    def tree(self, tree: Any) -> Any:
        """Grow all arrays of a pytree, such as parameters, optimizer moments or a train state.

        The last name of `NEURON_AXES` in the path of an array is the model array to which the
        pytree's array belongs. Arrays whose path contains `mu` or `nu` are treated as first or
        second moments of optax optimizers. Arrays without a name of `NEURON_AXES` in their path are
        returned unchanged.
        """

        def grown(path: Any, leaf: Any) -> Any:
            names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
            found = [name for name in names if name in NEURON_AXES]
            if not found:
                return leaf
            if "mu" in names:
                return self.gradient(found[-1], leaf)
            if "nu" in names:
                return self.gradient(found[-1], leaf, power=2)
            return self.parameter(found[-1], leaf)

        return jax.tree_util.tree_map_with_path(grown, tree)

    def _copied(self, name: str, value: Any, power: int) -> Any:
        """Copy the neurons in `value`, and multiply each copy by a power of its `share`."""
        if name not in NEURON_AXES:
            return value
        value = np.asarray(value)
        index, share = self.source, self.share**power
        if name in ("dx", "dy"):
            index, share = index[None], share[None]
        elif name == "e":
            index, share = index[..., None], share[..., None]
        copied = np.take_along_axis(value, index, axis=NEURON_AXES[name][1])
        return (copied * share).astype(value.dtype)


def plan_growth(config: HatchlingConfig, num_neurons: int, seed: int = 0) -> Growth:
    """Choose neurons to copy at random; every neuron is copied once before any is copied twice.

    Args:
        config: Config of the smaller model.
        num_neurons: Number of neurons of the grown model (n), a multiple of twice `num_heads`.
        seed: Seed for the choice of neuron pairs and for the angle φ of each copied pair.

    Raises:
        ValueError: `num_neurons` is not above the model's number of neurons, or is not a multiple
            of twice `num_heads`.
    """
    check_sizes(num_neurons=num_neurons)
    if num_neurons <= config.num_neurons:
        raise ValueError(
            f"num_neurons={num_neurons}: the model has {config.num_neurons} already: choose more, "
            f"such as {2 * config.num_neurons}"
        )
    pairs = dataclasses.replace(config, num_neurons=num_neurons).head_neurons // 2
    rng = np.random.default_rng(seed)
    source = np.tile(np.arange(config.head_neurons // 2), (config.num_heads, 1))
    share = np.ones(source.shape)
    while source.shape[1] < pairs:
        count = min(pairs - source.shape[1], source.shape[1])
        order = rng.permuted(np.broadcast_to(np.arange(source.shape[1]), source.shape), axis=1)
        chosen = order[:, :count]
        angle = np.deg2rad(rng.uniform(*ANGLES, chosen.shape))
        copied = np.take_along_axis(share, chosen, axis=1)
        np.put_along_axis(share, chosen, copied * np.cos(angle), axis=1)
        share = np.concatenate([share, copied * np.sin(angle)], axis=1)
        source = np.concatenate([source, np.take_along_axis(source, chosen, axis=1)], axis=1)
    both = 2 * source[..., None] + np.arange(2)  # the two neurons of a pair
    return Growth(both.reshape(config.num_heads, -1), np.repeat(share, 2, axis=1))


def grow(model: Hatchling, num_neurons: int, seed: int = 0) -> Hatchling:
    """Return a model with more neurons that computes the same function as `model`.

    To grow an optimizer state as well, call `plan_growth` with the same seed, then `Growth.tree`.

    Args:
        model: Model to grow; it is not changed.
        num_neurons: Number of neurons of the grown model (n), a multiple of twice `num_heads`.
        seed: Seed of the plan (`plan_growth`).

    Raises:
        ValueError: `num_neurons` does not fit the model (as in `plan_growth`), or the model has an
            adapter.
    """
    _check_merged(model)
    plan = plan_growth(model.config, num_neurons, seed)
    params = {name: plan.parameter(name, value) for name, value in _params(model).items()}
    return _model_of(dataclasses.replace(model.config, num_neurons=num_neurons), model, params)


_OF_TRAINING = ("dropout", "truncate", "context_length", "dtype")


def merge(models: Sequence[Hatchling], along: Literal["neurons", "heads"] = "neurons") -> Hatchling:
    """Merge models into one model with the neurons of all; other parameters are averaged.

    Training settings (dropout, truncation, context length) and the dtype of the computation are
    taken from the first model.

    Args:
        models: Two or more models of equal form, width, vocabulary and depth, in the order in which
            their neurons are concatenated.
        along: Axis of the concatenation. With "neurons", each head gets the neurons of all models,
            as in the paper, and its attention sums over all of these neurons. With "heads", the
            merged model has the heads of all models, and the attention of each head is unchanged.

    Raises:
        ValueError: There are fewer than two models, they differ in more than the number of neurons
            (with "heads": in more than the number of heads), a model has an adapter, or "heads" is
            chosen for models with `damping`, whose rates depend on the number of heads.
    """
    if along not in ("neurons", "heads"):
        raise ValueError(f"along={along!r}: choose neurons or heads")
    if isinstance(models, Hatchling) or len(models) < 2:
        count = 1 if isinstance(models, Hatchling) else len(models)
        raise ValueError(f"{count} model(s) to merge: give two or more, in a list")
    for model in models:
        _check_merged(model)
    first = models[0].config
    free = {"num_neurons", *_OF_TRAINING, *first.execution_fields}
    free |= {"num_heads"} if along == "heads" else set()
    for other in (model.config for model in models[1:]):
        if type(other) is not type(first):
            raise ValueError(
                f"a {type(first).__name__} and a {type(other).__name__} are of two architectures: "
                "merge models of one"
            )
        for field in dataclasses.fields(first):
            here, there = getattr(first, field.name), getattr(other, field.name)
            if here != there and field.name not in free:
                raise ValueError(
                    f"models to merge differ in {field.name}: {here} and {there}: they must agree "
                    f"in all but {' and '.join(sorted(free))}"
                )
        if along == "heads" and first.head_neurons != other.head_neurons:
            raise ValueError(
                f"heads of {first.head_neurons} and of {other.head_neurons} neurons can't stand "
                "side by side: merge along neurons"
            )
    if along == "heads" and first.damping:
        raise ValueError(
            "damping=True gives each head a rate that depends on the number of heads: merge along "
            "neurons"
        )
    config = dataclasses.replace(
        first,
        num_neurons=sum(model.config.num_neurons for model in models),
        num_heads=sum(m.config.num_heads for m in models) if along == "heads" else first.num_heads,
    )
    every, merged = [_params(model) for model in models], {}
    for name in every[0]:
        values = [params[name] for params in every]
        if name in NEURON_AXES:
            merged[name] = np.concatenate(values, axis=NEURON_AXES[name][along == "neurons"])
        else:
            merged[name] = jax.tree.map(_mean, *values)
    return _model_of(config, models[0], merged)


def _mean(*values: np.ndarray) -> np.ndarray:
    return np.mean(values, axis=0, dtype=np.float64).astype(values[0].dtype)


def _check_merged(model: Hatchling) -> None:
    if not isinstance(model, Hatchling):
        raise ValueError(f"a {type(model).__name__} in place of a model: give a Hatchling")
    if model.adapters is not None:
        raise ValueError("a model with an adapter beside it: merge the adapter first (merge_lora)")


def _params(model: Hatchling) -> dict[str, Any]:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


def _model_of(config: HatchlingConfig, like: Hatchling, params: dict[str, Any]) -> Hatchling:
    return type(like).from_params(config, params, like.constrain)
