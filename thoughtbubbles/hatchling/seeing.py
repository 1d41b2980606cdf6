"""Interpretability of a Dragon Hatchling: trace synapses over time, and test for concepts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.hatchling.attention import damping
from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.hatchling.model import Hatchling
from thoughtbubbles.hatchling.state import Neurons, State
from thoughtbubbles.short_repr import ShortRepr


@dataclasses.dataclass(frozen=True, repr=False)
class Synapses(ShortRepr):
    """A list of `M` synapses of one layer, each from a source neuron to a target neuron of a head.

    While the source neuron x is active, the synapse adds its strength times x to the gate of the
    target neuron y.

    Attributes:
        head: Index of the head of both neurons, `[M]` int.
        source: Index, within the head, of the source neuron x, `[M]` int.
        target: Index, within the head, of the target neuron y, `[M]` int.
    """

    head: np.ndarray
    source: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.head)


def synapse_traces(
    model: Hatchling, tokens: np.ndarray, layer: int, synapses: Synapses
) -> np.ndarray:
    """Compute the strength of synapses after each token of some texts.

    The strength of the synapse from source neuron j to target neuron i of a head is
    σ(i, j) = ρ_j · Dy_i, which is the amount that x_j = 1 at the next token would add to the gate
    of y_i, without the scale of the norm. Here ρ_j is the row of the state for neuron j, rotated
    and decayed to the position of the next token. Dy_i is centred, because the norm centres the
    vector that is multiplied by Dy_i.

    Args:
        model: Model without fork layers.
        tokens: Token ids `[B, T]`, without padding.
        layer: Index of the layer, from 0.
        synapses: The `M` synapses to trace.

    Returns:
        Strengths `[B, T, M]` float32.

    Raises:
        ValueError: The layer, a head or a neuron does not exist, a document begins inside a row, or
            the model has fork layers.
    """
    config = model.config
    if config.separator is not None and (np.asarray(tokens)[:, 1:] == config.separator).any():
        raise ValueError(
            f"token {config.separator} begins a document inside of a row: give each its own row"
        )
    _check_layer(config, layer)
    for name, index, count in (
        ("head", synapses.head, config.num_heads),
        ("source", synapses.source, config.head_neurons),
        ("target", synapses.target, config.head_neurons),
    ):
        index = np.asarray(index)
        if len(index) != len(synapses) or ((index < 0) | (index >= count)).any():
            raise ValueError(
                f"{name}={index.tolist()}: choose {len(synapses)} from 0 to {count - 1}"
            )
    seen = jax.device_get(_activations(model, jnp.asarray(tokens)))
    x, value = seen.x[layer].astype(np.float64), seen.value[layer].astype(np.float64)
    dy = np.asarray(model.dy[...], np.float64)
    decay = damping(config)
    gamma = np.ones(config.num_heads) if decay is None else np.asarray(decay, np.float64)
    time = np.arange(x.shape[1])
    distance = time[:, None] + 1 - time  # of the token after t from each token s
    past = distance > 0
    traces = [np.zeros((*x.shape[:2], 0))]
    for head, source, target in zip(synapses.head, synapses.source, synapses.target, strict=True):
        direction = dy[:, head, target] - dy[:, head, target].mean()
        phase = 2 * np.pi * distance * float(model.frequency[head, source])
        # RoPE rotates a pair (even, odd) by its phase; x_j = 1 selects one neuron of the pair.
        side = 1 if source % 2 == 0 else -1
        own, other = x[:, :, head, source], x[:, :, head, source + side]
        reach = np.where(past, gamma[head] ** np.maximum(distance, 0), 0)
        written = value @ direction
        trace = np.einsum("ts,bs->bt", reach * np.cos(phase), own * written)
        trace += side * np.einsum("ts,bs->bt", reach * np.sin(phase), other * written)
        traces.append(trace[..., None])
    return np.concatenate(traces, axis=-1).astype(np.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class MannWhitney(ShortRepr):
    """Results of the Mann-Whitney test of two samples of sizes m and n, one per column.

    Attributes:
        u: Statistic U: number of pairs of a value of the first sample and a value of the second
            sample in which the first value is larger; ties count as 1/2.
        rank_biserial: Rank-biserial correlation 2 u / (m n) - 1: 1 if every value of the first
            sample is larger than every value of the second, -1 if every value is smaller.
        p_value: Two-sided p-value: probability of a `u` at least as far from m n / 2 if both
            samples had the same distribution.
    """

    u: np.ndarray
    rank_biserial: np.ndarray
    p_value: np.ndarray


def mann_whitney(first: np.ndarray, second: np.ndarray) -> MannWhitney:
    """Test whether values are larger in one sample than in another (Mann-Whitney, two-sided).

    A synapse is monosemantic for a concept if its strengths where the concept is mentioned hardly
    overlap with its strengths elsewhere. The p-value is the normal approximation with corrections
    for ties and continuity. It is valid for a single test: test synapses on other texts than those
    on which they were chosen, or multiply the p-value by the number of synapses tried.

    Args:
        first: Values of the first sample, `[m, ...]`.
        second: Values of the second sample, `[n, ...]`.

    Returns:
        Results of the test for each column, arrays `[...]` float64.

    Raises:
        ValueError: A sample is empty, a value is not finite, or the samples differ in a size after
            axis 0.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"samples of {first.shape} and {second.shape}: give both the same columns after axis 0"
        )
    m, n = len(first), len(second)
    if min(m, n) < 1:
        raise ValueError(f"samples of {m} and {n} values: give each at least one")
    values = np.concatenate([first, second]).reshape(m + n, -1)
    if not np.isfinite(values).all():
        raise ValueError("samples hold values that are not finite: leave them out")
    u, deviation = np.empty((2, values.shape[1]))
    for column in range(values.shape[1]):
        _, inverse, count = np.unique(values[:, column], return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[inverse]  # ties share their mean rank
        u[column] = rank[:m].sum() - m * (m + 1) / 2
        ties = (count**3 - count).sum() / ((m + n) * (m + n - 1)) if m + n > 1 else 0.0
        deviation[column] = math.sqrt(max(m * n / 12 * (m + n + 1 - ties), 0))
    excess = np.maximum(np.abs(u - m * n / 2) - 0.5, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(deviation > 0, excess / deviation, 0)
    p_value = np.array([math.erfc(z / math.sqrt(2)) for z in score])
    shape = first.shape[1:]
    biserial = 2 * u / (m * n) - 1
    return MannWhitney(*(found.reshape(shape) for found in (u, biserial, p_value)))


def strongest_synapses(
    model: Hatchling, tokens: np.ndarray, layer: int, count: int
) -> tuple[Synapses, np.ndarray]:
    """Find the synapses of a layer that are strongest after some texts.

    Args:
        model: Model without fork layers.
        tokens: Token ids `[B, T]`, without padding.
        layer: Index of the layer, from 0.
        count: Number of synapses to find over all heads.

    Returns:
        Synapses, the strongest first, and the mean absolute strength of each synapse over the
        texts, `[count]` float64.

    Raises:
        ValueError: The layer does not exist, `count` is below 1 or above the layer's number of
            synapses, or the model has fork layers.
    """
    config = model.config
    _check_layer(config, layer)
    fork_layers = getattr(config, "fork_layers", ())
    if fork_layers:
        raise ValueError(
            "synapses of a model that forks have the phases of streams, not of tokens: look into a "
            f"Hatchling without fork layers (now {fork_layers})"
        )
    neurons = config.head_neurons
    if not 1 <= count <= config.num_heads * neurons**2:
        raise ValueError(
            f"count={count}: {config.num_heads} heads of {neurons} neurons have "
            f"{config.num_heads * neurons**2} synapses"
        )
    state = jax.device_get(_state_after(model, jnp.asarray(tokens)))
    found, strength = [], []
    for head in range(config.num_heads):
        matrix = np.zeros((neurons, neurons))
        for row, length in zip(state.synapses[layer], state.length, strict=True):
            matrix += np.abs(synapse_matrix(model, row, int(length), head)) / len(tokens)
        best = np.argpartition(-matrix, min(count, matrix.size) - 1, axis=None)[:count]
        found += [(head, *np.unravel_index(index, matrix.shape)) for index in best]
        strength += matrix.ravel()[best].tolist()
    order = np.argsort(-np.array(strength), kind="stable")[:count]
    head, source, target = np.array(found)[order].T
    return Synapses(head, source, target), np.array(strength)[order]


def synapse_matrix(model: Hatchling, synapses: np.ndarray, length: int, head: int) -> np.ndarray:
    """Compute the strengths of all synapses of a head at the position of a row's next token.

    Args:
        model: Model without fork layers.
        synapses: State of one row in one layer, `[H, N, d]` for `N` neurons per head and width d:
            `State.synapses[layer, row]`.
        length: Number of tokens of the row so far, an entry of `State.length`.
        head: Index of the head.

    Returns:
        Strengths `[N, N]` float64, from source neuron (axis 0) to target neuron (axis 1).
    """
    phase = 2 * np.pi * length * np.asarray(model.frequency[head], np.float64)[::2, None]
    even, odd = np.asarray(synapses[head], np.float64).reshape(len(phase), 2, -1).swapaxes(0, 1)
    cos, sin = np.cos(phase), np.sin(phase)
    # Stored neurons are rotated by the phases of their tokens; the query by that of the next token.
    seen = np.stack([even * cos + odd * sin, odd * cos - even * sin], axis=1)
    dy = np.asarray(model.dy[:, head], np.float64)
    return seen.reshape(synapses.shape[1:]) @ (dy - dy.mean(axis=0))


def most_active(neurons: np.ndarray, count: int) -> np.ndarray:
    """Return the indices `[count]` of the neurons with the largest summed activity, largest first.

    Args:
        neurons: Activity `[..., n]`, which is summed over all axes but the last.
        count: Number of neurons to return.
    """
    total = neurons.reshape(-1, neurons.shape[-1]).sum(axis=0)
    return np.argsort(-total, kind="stable")[:count]


def _check_layer(config: HatchlingConfig, layer: int) -> None:
    if not 0 <= layer < config.num_layers:
        raise ValueError(f"layer={layer}: choose from 0 to {config.num_layers - 1}")


@jax.jit
def _state_after(model: Hatchling, tokens: jax.Array) -> State:
    empty = model.init_cache(*tokens.shape)
    return model.advance(empty, tokens, jnp.full(len(tokens), tokens.shape[1], jnp.int32))[1]


@jax.jit
def _activations(model: Hatchling, tokens: jax.Array) -> Neurons:
    return model.activations(tokens)
