"""The recurrent state of a Dragon Hatchling, and the results of a forward pass."""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
from flax import nnx

from thoughtbubbles.checks import check_lengths
from thoughtbubbles.placement import AnyArray, placed_beside
from thoughtbubbles.short_repr import ShortRepr, short_repr


class Frequency(nnx.Variable):
    """Rotary frequencies in turns per token: constants, not parameters, but saved in checkpoints.

    Frequencies can't be recomputed from the config, because the neurons of a grown model have the
    frequencies of the neurons that they copy.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class State(ShortRepr):
    """State of a Hatchling after the tokens so far, which replaces a KV cache in decoding.

    The size of the state does not depend on the number of tokens.

    Attributes:
        length: Number of tokens in each row since its last document began, `[B]` int32.
        synapses: Sum of outer products of rotated neurons and values in each layer,
            `[L, B, H, N, d]` float32 (ρ of the paper), for `L` layers, `N` neurons per head and
            width `d`.
    """

    length: jax.Array
    synapses: jax.Array

    @classmethod
    def check(cls, cache: Any, x: jax.Array, length: AnyArray) -> None:
        """Raise a ValueError unless a state has this class, and state and lengths have `B` rows.

        Args:
            cache: State to extend.
            x: Vectors `[B, C, d]` that are to be appended to the rows of the state.
            length: Number of real vectors in each row, `[B]` or a scalar.
        """
        if type(cache) is not cls:
            raise ValueError(
                f"a {type(cache).__name__} in place of a {cls.__name__}: give that of "
                "init_cache(batch, max_tokens), or of the last call"
            )
        if cache.length.shape[0] != x.shape[0]:
            raise ValueError(
                f"a state of {cache.length.shape[0]} rows for vectors of {x.shape[0]}: begin with "
                "init_cache of that batch"
            )
        check_lengths(length, x.shape[0])

    def beside(self, rows: AnyArray) -> Self:
        """Shard the batch axis of the state like that of an array `rows [B, ...]`."""
        length = placed_beside(self.length, rows)
        synapses = placed_beside(self.synapses, rows, axis=1)
        return dataclasses.replace(self, length=length, synapses=synapses)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Activations(ShortRepr):
    """Result of a forward pass: hidden states, and counts of active neurons.

    Attributes:
        hidden: Hidden states `[B, T, d]` of width d.
        tokens: Number of real tokens of the batch, a float32 scalar.
        x_active: Number of neurons x above 0 in each of `L` layers, summed over tokens, `[L]`
            float32.
        y_active: Number of gated neurons y above 0 in each of `L` layers, summed over tokens, `[L]`
            float32.
    """

    hidden: jax.Array
    tokens: jax.Array
    x_active: jax.Array
    y_active: jax.Array


class Neurons(NamedTuple):
    """Activations of the neurons of each layer at each token; 0 in padding.

    Attributes:
        x: Neurons `[L, B, T, H, N]` of `L` layers with `N` neurons per head, the queries and keys
            of attention (before rotation).
        y: Gated neurons `[L, B, T, H, N]`, from which the layer computes its output.
        value: Input vectors of the layer, `[L, B, T, d]` of width d, from which x is computed, and
            which are also the values of attention.
    """

    x: jax.Array
    y: jax.Array
    value: jax.Array

    __repr__ = short_repr


class Layers(NamedTuple):
    """Result of `L` consecutive layers on a chunk of `C` vectors per row.

    Attributes:
        value: Vectors `[B, C, d]` after the last of these layers.
        x_active: Number of neurons x above 0 in each layer, summed over tokens, `[L]` float32.
        y_active: Number of gated neurons y above 0 in each layer, summed over tokens, `[L]`
            float32.
        watched: Neurons of each layer; None unless `_layers` was called with `watch`.
        carried: In the paper's form, neurons `[H, B, C, N]` after the last layer; None in the
            released form.
    """

    value: jax.Array
    x_active: jax.Array
    y_active: jax.Array
    watched: Neurons | None
    carried: jax.Array | None = None

    __repr__ = short_repr
