"""What a Dragon Hatchling keeps of the past, and what a forward pass returns."""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
from flax import nnx

from thoughtbubbles.checks import check_lengths
from thoughtbubbles.placement import AnyArray, placed_beside
from thoughtbubbles.short_repr import ShortRepr, short_repr


class Frequency(nnx.Variable):
    """Rotary frequencies in turns per token; a constant that checkpoints keep, since a model that
    has grown keeps the frequencies of its old neurons."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class State(ShortRepr):
    """What a Hatchling keeps of the tokens that it has read; its size does not grow with them.

    Attributes:
        length: Number of tokens so far, since the last document began, `[B]` int32.
        synapses: Sum of outer products of rotated neurons and values in each layer,
            `[L, B, H, N, d]` float32 (ρ of the paper).
    """

    length: jax.Array
    synapses: jax.Array

    @classmethod
    def check(cls, cache: Any, x: jax.Array, length: AnyArray) -> None:
        """Raise a ValueError unless a state of this class, and lengths, are of the vectors' rows.

        Args:
            cache: State that is to be extended.
            x: Vectors `[B, C, d]`.
            length: Number of real vectors in each row.
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
        """The same state placed on the devices as rows `[B, ...]` are."""
        length = placed_beside(self.length, rows)
        synapses = placed_beside(self.synapses, rows, axis=1)
        return dataclasses.replace(self, length=length, synapses=synapses)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Activations(ShortRepr):
    """Result of a forward pass.

    Attributes:
        hidden: Hidden states `[B, T, d]`.
        tokens: Number of real tokens, float32.
        x_active: Number of neurons x above 0 in each layer, over all tokens, `[L]` float32.
        y_active: Number of gated neurons y above 0 in each layer, over all tokens, `[L]` float32.
    """

    hidden: jax.Array
    tokens: jax.Array
    x_active: jax.Array
    y_active: jax.Array


class Neurons(NamedTuple):
    """What the neurons of each layer did at each token; 0 in padding.

    Attributes:
        x: Neurons `[L, B, T, H, N]`, which attention reads and writes with.
        y: Gated neurons `[L, B, T, H, N]`, of which the layer makes its output.
        value: Vectors `[L, B, T, d]` that the layer makes neurons of and writes to its synapses.
    """

    x: jax.Array
    y: jax.Array
    value: jax.Array

    __repr__ = short_repr


class Layers(NamedTuple):
    """What the layers made of a chunk.

    Attributes:
        value: Hidden states `[B, C, d]`.
        x_active: Number of neurons x above 0 in each layer, `[L]` float32.
        y_active: Number of gated neurons y above 0 in each layer, `[L]` float32.
        watched: Neurons of each layer; None unless they are watched.
        carried: Neurons `[H, B, C, N]` behind the last layer in the paper's form; None otherwise.
    """

    value: jax.Array
    x_active: jax.Array
    y_active: jax.Array
    watched: Neurons | None
    carried: jax.Array | None = None

    __repr__ = short_repr
