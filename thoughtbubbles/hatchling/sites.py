"""Sites of a Dragon Hatchling, at which activations are captured or edited; and its neurons."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles.architecture import Architecture, Constrain
from thoughtbubbles.checks import check_ids
from thoughtbubbles.forking import merge
from thoughtbubbles.hatchling.attention import Reach, normalized
from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.hatchling.state import Activations, Neurons
from thoughtbubbles.placement import AnyArray, broadcast_beside
from thoughtbubbles.rows import real_ids
from thoughtbubbles.sites import Visit, plan_of
from thoughtbubbles.streams import Streams


class SitedHatchling(Architecture):
    """The methods of a Hatchling that implement `thoughtbubbles.sites.SitedModel`."""

    config: HatchlingConfig
    constrain: Constrain
    forks: Any = ()
    _first: Callable[[jax.Array], jax.Array]
    _layers: Callable[..., tuple[Any, Any]]
    _starts: Callable[[jax.Array], jax.Array | None]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order of the forward pass.

        `embed` is the input of the first layer, `fork_i` the output of the fork layer in front of
        layer `i`, and `block_i` the output of layer `i`.
        """
        forked = [start for start, _ in self._groups_of_layers()[1:]]
        names = ["embed"]
        for layer in range(self.config.num_layers):
            names += [f"fork_{layer}"] * (layer in forked) + [f"block_{layer}"]
        return tuple(names)

    @property
    def neuron_sites(self) -> tuple[str, ...]:
        """Names of the sites `x_i` and `y_i`, the neurons of layer `i` before and after the gate.

        The activations `[B, S, n]` are sparse features without a sparse autoencoder. These sites
        can be captured, but not edited.
        """
        return tuple(f"{kind}_{i}" for i in range(self.config.num_layers) for kind in "xy")

    def run_sites(self, inputs: jax.Array, length: AnyArray | None, visit: Visit) -> Streams:
        """As `SitedModel.run_sites`; each row is processed at once, and `chunk` is ignored."""
        starts = None
        if jnp.ndim(inputs) != 3:
            check_ids(inputs)
            inputs = real_ids(inputs, length)
            starts, inputs = self._starts(inputs), self.embed_tokens(inputs)
        x = self._first(inputs.astype(self.config.dtype))
        streams = visit("embed", Streams.start(x, length))
        carried = None
        for index, (start, end) in enumerate(self._groups_of_layers()):
            if index:
                before, fork = streams, self.forks[index - 1]
                streams = fork(before)
                streams = streams.replace(x=self.constrain(streams.x))
                streams = visit(f"fork_{start}", streams, plan_of(fork, before))
            reach, score = self._reach(streams, starts)
            for last in range(start, end):
                watch = visit.wants(f"x_{last}") or visit.wants(f"y_{last}")
                if not (watch or visit.wants(f"block_{last}") or last == end - 1):
                    continue
                read, _ = self._layers(
                    streams.x, reach, None, watch=watch, layers=(start, last + 1),
                    write_scale=score, carried=carried,
                )  # fmt: skip
                if watch:
                    for name, neurons in (("x", read.watched.x), ("y", read.watched.y)):
                        flat = neurons[-1].reshape(*neurons.shape[1:3], -1)
                        visit(f"{name}_{last}", streams.replace(x=flat))
                streams = visit(f"block_{last}", streams.replace(x=read.value))
                start, carried = last + 1, read.carried
        return streams

    def decode(self, x: jax.Array) -> jax.Array:
        """Apply the LM head (there is no final norm): vectors `[..., d]` to logits `[..., V]`."""
        return self.unembed(x)

    def activations(self, tokens: AnyArray, length: AnyArray | None = None) -> Neurons:
        """Compute the neurons of all layers at each token, as features for interpretability.

        Args:
            tokens: Token ids `[B, T]` int32, padded on the right.
            length: Number of real tokens in each row, `[B]` int32; all `T` by default.
        """
        check_ids(tokens)
        tokens = jnp.asarray(real_ids(tokens, length))
        streams = Streams.start(self._first(self.embed_tokens(tokens)), length)
        reach, _ = self._reach(streams, self._starts(tokens))
        return self._layers(streams.x, reach, None, watch=True)[0].watched

    def _groups_of_layers(self) -> list[tuple[int, int]]:
        """Ranges `(first, last + 1)` of layers between fork layers."""
        return [(0, self.config.num_layers)]

    def _reach(self, streams: Streams, starts: jax.Array | None) -> tuple[Reach, jax.Array | None]:
        """Reach of streams of whole rows, and factor on each residual update; None means 1."""
        first = broadcast_beside(0, streams.x, 1)
        return Reach.of(self.config, first, streams.length, streams.x.shape[1], starts), None


def merged(streams: Streams) -> jax.Array:
    """Return the hidden state of each token, `[B, T, d]`: the score-weighted sum of its streams.

    The sum is normalised, except without a fork layer, where each token has one stream.
    """
    hidden = merge(streams)
    return normalized(hidden) if streams.forked else hidden


def hidden_of(output: Activations | Streams | jax.Array) -> jax.Array:
    """Return the hidden states `[B, T, d]` of a forward pass, or of streams at a site."""
    if isinstance(output, Streams):
        return merged(output)
    return output.hidden if isinstance(output, Activations) else output
