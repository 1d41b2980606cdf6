"""ForkingHatchling: a Dragon Hatchling with fork layers between its layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, Unpack, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from thoughtbubbles import fork_models, statistics
from thoughtbubbles.architecture import ARCHITECTURES, Constrain
from thoughtbubbles.changes import preset_of
from thoughtbubbles.checks import check_ids, check_vectors
from thoughtbubbles.fork_cache import ForkCache
from thoughtbubbles.hatchling.attention import Reach, damping
from thoughtbubbles.hatchling.config import PRESETS, HatchlingConfig, HatchlingConfigChanges
from thoughtbubbles.hatchling.model import Hatchling
from thoughtbubbles.hatchling.sites import merged
from thoughtbubbles.hatchling.state import Activations, Neurons, State
from thoughtbubbles.layers import Fork
from thoughtbubbles.placement import AnyArray, broadcast_beside
from thoughtbubbles.policies import PrefixRank
from thoughtbubbles.policy import Policy
from thoughtbubbles.rows import real_ids
from thoughtbubbles.streams import Streams


@dataclasses.dataclass(frozen=True)
class ForkingHatchlingConfig(HatchlingConfig):
    """Sizes and options of a Dragon Hatchling of the released form with fork layers.

    Attributes:
        fork_layers: Indices, from 0, of the layers with a fork layer in front.
        policy: Policy by which the fork layers choose the streams that fork and the streams that
            die.
    """

    fork_layers: tuple[int, ...] = (1,)
    policy: Policy = PrefixRank()

    def __post_init__(self):
        super().__post_init__()
        if self.form == "paper":
            raise ValueError(
                "form='paper' has no residual stream of width d, neurons are its residual: "
                "choose form='released' to fork"
            )
        for name in ("chunk", "separator", "truncate"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} cuts rows, of which fork layers choose as a "
                    "whole: leave it out"
                )
        for layer in self.fork_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"fork layer {layer} is out of range for num_layers={self.num_layers}: "
                    f"choose from 0 to {self.num_layers - 1}"
                )
        if list(self.fork_layers) != sorted(set(self.fork_layers)):
            raise ValueError(f"fork_layers={self.fork_layers} must rise without repeats")

    @classmethod
    def preset(
        cls, name: str, **changes: Unpack["ForkingHatchlingConfigChanges"]
    ) -> "ForkingHatchlingConfig":
        """Make the config of a preset of `HatchlingConfig` with fork layers, with changes.

        Args:
            name: Name of the preset.
            changes: Values of fields that differ from the preset's, such as `fork_layers`.

        Raises:
            ValueError: There is no preset of that name, or the fields do not fit together.
            TypeError: A change names no field.
        """
        presets = {name: cls(**vars(config)) for name, config in PRESETS.items()}
        return preset_of(presets, name, changes)

    @property
    def causal(self) -> bool:
        return not self.fork_layers or self.policy.causal

    def groups(self) -> list[tuple[int, int]]:
        """Ranges `(first, last + 1)` of layers between fork layers; the first may be empty."""
        cuts = [0, *self.fork_layers, self.num_layers]
        return list(zip(cuts[:-1], cuts[1:], strict=True))

    def slots(self, num_tokens: int) -> list[int]:
        """Number of stream slots per row in each range of layers (see `groups`)."""
        counts = [num_tokens]
        for _ in self.fork_layers:
            counts.append(min(2 * counts[-1], self.policy.capacity(num_tokens)))
        return counts

    def prefill_bytes(self, num_tokens: int) -> int:
        """Estimate the bytes of a forward pass over one row, without parameters and cache."""
        return super().prefill_bytes(max(self.slots(num_tokens)))

    def extend_bytes(self, rows: int, num_tokens: int) -> int:
        """Estimate the bytes of prefilling `num_tokens` more tokens in each of `rows` rows."""
        return rows * super().prefill_bytes(num_tokens * 2 ** len(self.fork_layers))

    def num_params(self) -> int:
        """Number of parameters: 3nd + 2Vd, plus 5d for each fork layer."""
        return super().num_params() + 5 * self.embed_dim * len(self.fork_layers)

    def forward_flops(self, num_tokens: int) -> int:
        """Matrix-multiplication FLOPs of a forward pass over `num_tokens`, logits included."""
        d, n, h = self.embed_dim, self.num_neurons, self.num_heads
        total, slots = num_tokens * d * self.vocab_size, self.slots(num_tokens)
        for count, (start, end) in zip(slots, self.groups(), strict=True):
            total += (end - start) * (3 * count * n * d + count**2 * (n + h * d))
        total += sum(2 * count * d for count in slots[:-1])
        if self.fork_layers:
            total += num_tokens * slots[-1] * d  # the merge
        return 2 * total

    def summary(self) -> str:
        return f"{super().summary()}, forks before layers {self.fork_layers}, {self.policy}"


class ForkingHatchlingConfigChanges(HatchlingConfigChanges, total=False):
    """Keyword arguments of `ForkingHatchlingConfig.preset`."""

    fork_layers: tuple[int, ...]
    policy: Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ForkingState(State):
    """State of a Hatchling with fork layers after the tokens so far, its cache in decoding.

    Attributes:
        forks: State of each fork layer.
        max_tokens: Maximum number of tokens per row (static); the states of policies have this
            capacity.
    """

    forks: tuple[ForkCache, ...]
    max_tokens: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ForkingActivations(Activations):
    """Result of a forward pass with fork layers.

    Attributes:
        streams: Streams after the last layer.
        forks: Streams directly after each fork layer.
    """

    streams: Streams
    forks: tuple[Streams, ...]


class ForkingHatchling(Hatchling):
    """A Dragon Hatchling with fork layers, in which a token may have several residual streams.

    Streams are in the order of the text, with each fork directly left of its parent, and each
    stream attends to the streams left of it. The score p of a stream multiplies its contribution to
    the synapses, which corresponds to a bias of log p in softmax attention, and the updates that
    layers add to its residual. After the last layer, the score-weighted sum of each token's streams
    is normalised.

    Args:
        config: Sizes and options of the model.
        rngs: PRNG keys to initialise the parameters.
        constrain: Function applied to every residual array `[B, S, d]` (width d) between layers.
        attend: Not used, because attention is linear.
        kernel_init: Initializer of all kernels, including those of the fork layers; the default is
            that of `Hatchling`.
        param_dtype: Dtype of the parameters; the config's `dtype` is used in the computation.

    Raises:
        ValueError: The config is not a `ForkingHatchlingConfig`.
    """

    config_class: ClassVar[type[ForkingHatchlingConfig]] = ForkingHatchlingConfig
    config: ForkingHatchlingConfig

    def __init__(
        self,
        config: ForkingHatchlingConfig,
        *,
        rngs: nnx.Rngs,
        constrain: Constrain | None = None,
        attend: Any = None,
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        options: Any = {"rngs": rngs, "kernel_init": kernel_init, "param_dtype": param_dtype}
        super().__init__(config, constrain=constrain, attend=attend, **options)
        width, policy = config.embed_dim, config.policy
        self.forks = nnx.List([Fork(width, policy, **options) for _ in config.fork_layers])

    def run(
        self,
        tokens: AnyArray,
        length: AnyArray | None = None,
        *,
        track: bool = False,
        key: jax.Array | None = None,
    ) -> ForkingActivations:
        check_ids(tokens)
        x = self.embed_tokens(real_ids(tokens, length))
        streams = Streams.start(self._first(x), length)

        def fork(index: int, streams: Streams) -> Streams:
            own = None if key is None else jax.random.fold_in(key, self.config.num_layers + index)
            return self.forks[index](streams, track=track, key=own)

        return self._groups(streams, None, fork, key)[0]

    def hidden_states(
        self,
        x: jax.Array,
        length: AnyArray | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
        starts: jax.Array | None = None,
    ) -> jax.Array:
        if positions is not None or visible is not None or starts is not None:
            raise ValueError(
                "rows that are not one text from left to right can't fork: use a Hatchling without "
                f"fork layers (now {self.config.fork_layers})"
            )
        check_vectors(x, self.config.embed_dim, "a Hatchling")
        streams = Streams.start(self._first(x.astype(self.config.dtype)), length)
        fork = lambda index, streams: self.forks[index](streams)  # noqa: E731
        return self._groups(streams, None, fork)[0].hidden

    @property
    def takes_positions(self) -> bool:
        return False

    def activations(self, tokens: AnyArray, length: AnyArray | None = None) -> Neurons:
        raise ValueError(
            "neurons of a model that forks belong to streams, not to tokens: capture their sites, "
            f"such as y_0 (thoughtbubbles.lens.capture; fork layers {self.config.fork_layers})"
        )

    def init_cache(self, batch: int, max_tokens: int) -> ForkingState:
        """Return the state of `batch` empty rows with a capacity of `max_tokens` tokens each.

        Raises:
            ValueError: The policy can't be used with a cache (`CausalPolicy`), or a size is below
                1.
        """
        self.check_cacheable()
        empty = super().init_cache(batch, max_tokens)
        forks: list[ForkCache] = []
        for fork in self.forks:
            before = forks[-1] if forks else None
            forks.append(fork.init_cache(batch, max_tokens, before=before))
        return ForkingState(empty.length, empty.synapses, tuple(forks), max_tokens)

    def cache_batch_axes(self, cache: State) -> State:
        state = cast(ForkingState, cache)
        first = jax.tree.map(lambda leaf: 0, state.forks)
        return ForkingState(0, 1, first, state.max_tokens)  # pyright: ignore[reportArgumentType]

    def extend(
        self,
        cache: State,
        x: jax.Array,
        length: AnyArray,
        *,
        fresh: bool = False,
        starts: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """As `Hatchling.extend`; a row that exceeds `max_tokens` is NaN in this and later calls."""
        state = cast(ForkingState, cache)
        if starts is not None:
            raise ValueError("a document can't begin inside of a row that forks: leave starts out")
        check_vectors(x, self.config.embed_dim, "a Hatchling")
        ForkingState.check(state, x, length)
        x = x.astype(self.config.dtype)
        if not x.shape[1]:
            return x, cache
        length, state = broadcast_beside(length, x, 1), state.beside(x)
        after = state.length + length
        wrong = (after > state.max_tokens) | (length > x.shape[1]) | (length < 0)
        x = jnp.where(wrong[:, None, None], jnp.nan, x)
        streams = Streams.start(self._first(x), length, first=state.length)
        forks = list(state.forks)

        def fork(index: int, streams: Streams) -> Streams:
            layer: Fork = self.forks[index]
            streams, _, forks[index] = layer.advance(streams, forks[index], fresh=fresh)
            return streams

        read, synapses = self._groups(streams, state.synapses, fork, fresh=fresh)
        assert synapses is not None
        after = jnp.where(wrong, state.max_tokens + 1, after)
        hidden = jnp.where(wrong[:, None, None], jnp.nan, read.hidden)
        return hidden, ForkingState(after, synapses, tuple(forks), state.max_tokens)

    @property
    def fork_policy(self) -> Policy | None:
        return self.config.policy if self.config.fork_layers else None

    def with_policy(self, policy: Policy) -> Self:
        """Return a model of the same arrays with another policy, for inference.

        Raises:
            ValueError: The policy tracks a threshold, and the fork layers have no threshold.
        """
        return fork_models.with_policy(self, policy)

    @property
    def cacheable(self) -> bool:
        return fork_models.cacheable(self.config)

    def check_cacheable(self) -> None:
        fork_models.check_cacheable(self.config)

    def statistics(self, output: Any) -> dict[str, jax.Array]:
        """Sums of `Hatchling.statistics`, and of `fork_statistics` with the prefix `fork_`."""
        sums = statistics.fork_statistics(output)
        return super().statistics(output) | {f"fork_{name}": sums[name] for name in sums}

    def row_statistics(self, output: Any) -> dict[str, jax.Array]:
        return {"streams": output.streams.alive.sum(axis=1)}

    @classmethod
    def tracked_statistics(cls, tracked: Any) -> dict[str, jax.Array]:
        found = statistics.thresholds(tracked)
        return {f"fork_{name}": value for name, value in found.items()}

    @classmethod
    def step_metrics(cls, config: Any, sums: Mapping[str, Any]) -> dict[str, Any]:
        forks = _of_forks(sums)
        return super().step_metrics(config, sums) | statistics.readable(forks, config.fork_layers)

    @classmethod
    def step_histograms(cls, config: Any, sums: Mapping[str, Any]) -> dict[str, Any]:
        return statistics.score_samples(_of_forks(sums), config.fork_layers)

    def _groups_of_layers(self) -> list[tuple[int, int]]:
        return self.config.groups()

    def _reach(self, streams: Streams, starts: jax.Array | None) -> tuple[Reach, jax.Array | None]:
        score = jnp.exp(streams.log_score) if streams.forked else None
        return reach_of(self.config, streams, score), score

    def _groups(
        self, streams: Streams, synapses: jax.Array | None, fork, key=None, fresh: bool = False
    ) -> tuple[ForkingActivations, jax.Array | None]:
        """Apply all layers and fork layers in their order.

        Args:
            streams: Streams before the first layer, one for each token.
            synapses: Synapses before these tokens, `[L, B, H, N, d]`; None for whole rows.
            fork: Function from a fork layer's index and the streams before this fork layer to the
                streams after it.
            key: PRNG key of dropout; None for no dropout.
            fresh: Static promise that the synapses are 0.

        Returns:
            Result of the forward pass, and the synapses after it (None if `synapses` is None).
        """
        forks, after, active = [], [], []
        tokens = streams.alive.sum(dtype=jnp.float32)
        for index, (start, end) in enumerate(self.config.groups()):
            if index:
                streams = fork(index - 1, streams)
                streams = streams.replace(x=self.constrain(streams.x))
                forks.append(streams)
            before = None if synapses is None else synapses[start:end]
            reach, score = self._reach(streams, None)
            read, new = self._layers(
                streams.x, reach, before, key, fresh, layers=(start, end), write_scale=score
            )
            streams = streams.replace(x=read.value)
            after.append(new)
            # Scaled to one stream per token, because metrics divide by the number of tokens.
            share = tokens / jnp.maximum(streams.alive.sum(dtype=jnp.float32), 1)
            active.append((read.x_active * share, read.y_active * share))
        hidden = merged(streams)
        x_active, y_active = map(jnp.concatenate, zip(*active, strict=True))
        output = ForkingActivations(hidden, tokens, x_active, y_active, streams, tuple(forks))
        return output, None if synapses is None else jnp.concatenate(after)


def reach_of(config: HatchlingConfig, streams: Streams, score: jax.Array | None) -> Reach:
    """Compute the reach of streams: each stream attends to the streams left of it.

    Args:
        config: Config of the model.
        streams: Streams; dead slots add nothing to the state.
        score: Score p of each stream, which multiplies the stream's contribution to attention and
            to the state, `[B, S]` float32; None for 1.
    """
    slot = jnp.arange(streams.token.shape[1])
    decay_mask = (slot[:, None] > slot).astype(jnp.float32)
    query_decay, key_decay, state_decay = None, None, None
    decay = damping(config)
    if decay is not None:
        token = streams.token
        distance = jnp.maximum(token[:, :, None] - token[:, None, :], 0)
        decay_at = decay[:, None, None]
        decay_mask = decay_mask * decay_at[..., None] ** distance
        query_decay = decay_at**token
        key_decay = decay_at ** jnp.maximum(streams.length[:, None] - token, 0)
        state_decay = decay ** streams.length[:, None]
    if score is not None:
        decay_mask = decay_mask * score[:, None, :]
        key_decay = score * (jnp.float32(1) if key_decay is None else key_decay)
    end = streams.first + streams.length
    position, offset = streams.split_positions()
    bound = None if streams.continued else streams.num_tokens
    return Reach(
        position, streams.alive, decay_mask, query_decay, key_decay, state_decay, end, offset, bound
    )


def _of_forks(sums: Mapping[str, Any]) -> dict[str, Any]:
    return {name[5:]: value for name, value in sums.items() if name.startswith("fork_")}


ARCHITECTURES["forking_hatchling"] = ForkingHatchling
