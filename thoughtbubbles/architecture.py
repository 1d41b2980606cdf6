"""Base classes of decoders: what training, evaluation, generation, memory and RL call.

A new architecture is a config, a module with five methods over rows of vectors, and an entry in
`ARCHITECTURES`. Training, evaluation, generation, memory and RL use the methods of `Architecture`
alone; bubble maps and weights of Hugging Face decoders are for `Thoughtbubbles` only.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles.module import Module, abstract_module
from thoughtbubbles.parameters import with_params
from thoughtbubbles.placement import AnyArray
from thoughtbubbles.rows import left_align, nats_of, next_tokens, restore_alignment
from thoughtbubbles.sampling import log_prob_of

Constrain = Callable[[jax.Array], jax.Array]


class Tracked(nnx.Variable):
    """Model state that training updates from its batches; not a parameter, constant otherwise."""


class ArchitectureConfig:
    """Base class of the configs of architectures, which are frozen dataclasses of JSON values.

    Fields that `--architecture "name(field=value)"` sets are numbers, strings, bools, tuples of
    these, or None. A field of another type, such as a policy, has an option `--model.*` of its own.

    Attributes:
        vocab_size: Number of token ids that the embedding knows (V).
        embed_dim: Width of the vectors that the model reads and of its hidden states (D).
        context_length: Number of tokens of a text that the weights are meant for; None if unknown.
        dtype: Type of the computation; parameters are float32.
        scan_layers: Whether layers run in a scan, which compiles faster, if the model has a choice.
        remat: Activations that the backward pass recomputes, if the model has a choice.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]
    vocab_size: int
    embed_dim: int
    context_length: int | None = None
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"

    execution_fields: ClassVar[tuple[str, ...]] = ("scan_layers", "remat")
    """Fields that change how a result is computed, not the result. A run may be resumed, and a
    cache used, with other values of these fields."""

    @property
    def causal(self) -> bool:
        """Whether the logits at a position depend only on tokens up to it, by construction."""
        return True

    def num_params(self) -> int:
        """Number of parameters of the model."""
        model = abstract_module(lambda: architecture_of(self)(self, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    def forward_flops(self, num_tokens: int) -> int:
        """Matrix-multiplication FLOPs of a forward pass over a row of tokens, logits included.

        The default counts one use of every parameter for each token.
        """
        return 2 * self.num_params() * num_tokens

    def recomputed_flops(self, num_tokens: int) -> int:
        """FLOPs that the backward pass of a row of tokens spends on recomputing forward results."""
        return 0

    def summary(self) -> str:
        """Describe the model in a few words, for the first line that a run prints."""
        return type(self).__name__

    def sizes(self) -> str:
        """Describe the sizes of the model in one line."""
        return ", ".join(f"{name} {getattr(self, name)}" for name in self.__dataclass_fields__)

    def unused_fields(self) -> tuple[str, ...]:
        """Names of fields that this config does not use; they may differ when a run is resumed."""
        return ()

    def attention_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...] | None:
        """Shapes of query, key, value and bias, to choose a kernel by; None if it can't use one."""
        return None


class Architecture(Module):
    """Base class of decoders: five methods to write, on which the defaults of the others build.

    A subclass writes the constructor, `embed_tokens`, `hidden_states`, `unembed`, and, for decoding
    with a cache, `init_cache` and `extend`. An architecture that predicts from more than one hidden
    state per token overrides `run`, `logits`, `logits_at`, `log_prob` and `advance` instead, and
    returns another `backbone`.

    Parameters are `nnx.Param`s; the metadata `axes` names their logical axes for sharding and
    `inputs` counts the leading axes that a product contracts (`thoughtbubbles.weights.weight`).
    Parameters without metadata are replicated.

    Attributes:
        config: Config that the model was made with.
        config_class: Class of the configs of this architecture.
    """

    config_class: ClassVar[type[Any]]
    config: Any

    def __init__(
        self,
        config: Any,
        *,
        rngs: nnx.Rngs,
        constrain: Constrain | None = None,
        attend: Any = None,
    ):
        """Create the parameters.

        Args:
            config: Sizes and options, an instance of `config_class`.
            rngs: Random keys of the initial values.
            constrain: Function that keeps residuals `[B, S, D]` sharded over the batch, to be
                applied between blocks; None on one device.
            attend: Attention function (`thoughtbubbles.attention.Attend`), such as a kernel, for
                architectures with `attention_inputs`; None for the architecture's default.
        """
        raise NotImplementedError(f"{type(self).__name__} has no constructor")

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    # To be written.

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Vectors `[..., D]` of token ids `[...]` int32."""
        raise NotImplementedError(f"{type(self).__name__} has no embed_tokens")

    def hidden_states(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states `[B, T, D]` of vectors, after the final norm.

        Args:
            x: Vectors `[B, T, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; all `T` by default.
            positions: Position of each vector, `[B, T]` int32, given together with `visible` in
                place of `length`; only for an architecture with `takes_positions`.
            visible: Whether a vector (axis 1) attends to another (axis 2), `[B, T, T]` bool.
        """
        raise NotImplementedError(f"{type(self).__name__} has no hidden_states")

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits `[..., V]` float32 of hidden states `[..., D]`."""
        raise NotImplementedError(f"{type(self).__name__} has no unembed")

    def init_cache(self, batch: int, max_tokens: int) -> Any:
        """Return an empty cache, a pytree whose arrays have rows on axis 0 (`cache_batch_axes`).

        Args:
            batch: Number of rows.
            max_tokens: Maximum number of vectors in a row.
        """
        raise NotImplementedError(f"{type(self).__name__} can't decode with a cache")

    def cache_batch_axes(self, cache: Any) -> Any:
        """Axis of the rows in each array of a cache (same pytree); None if all rows share it."""
        return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, cache)

    def extend(
        self, cache: Any, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Any]:
        """Append vectors to the rows of a cache and return their hidden states.

        Any split of a row into calls gives the hidden states of one call of `hidden_states`.

        Args:
            cache: Cache that `init_cache` or `extend` returned; it stays usable.
            x: Vectors `[B, C, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; 0 leaves a row as it is.
            fresh: Static promise that the cache is empty.

        Returns:
            Hidden states `[B, C, D]`, and the new cache.
        """
        raise NotImplementedError(f"{type(self).__name__} can't decode with a cache")

    # What follows.

    def run(
        self,
        tokens: AnyArray,
        length: AnyArray | None = None,
        *,
        track: bool = False,
        key: jax.Array | None = None,
    ) -> Any:
        """Run the model without the head; `logits`, `logits_at` and `log_prob` take the result.

        Args:
            tokens: Token ids `[B, T]` int32, padded on the right.
            length: Number of real tokens in each row, `[B]` int32; all `T` by default.
            track: Whether to update `Tracked` variables from these tokens, as in training.
            key: Random key of noise in training; None for no noise.
        """
        x = self.embed_tokens(jnp.asarray(tokens))
        return self.hidden_states(x, None if length is None else jnp.asarray(length))

    def logits(self, output: Any) -> jax.Array:
        """Logits `[B, T, V]` float32 of what `run` or `advance` returned."""
        return self.unembed(output)

    def logits_at(self, output: Any, position: AnyArray) -> jax.Array:
        """Logits `[B, V]` float32 of one position in each row.

        Args:
            output: What `run` or `advance` returned.
            position: Position in each row, `[B]` int32.
        """
        hidden = jnp.take_along_axis(output, position[:, None, None], axis=1)
        return self.unembed(hidden)[:, 0]

    def log_prob(self, output: Any, targets: AnyArray) -> jax.Array:
        """Log-probability of the target at each position, `[B, T]` float32.

        Args:
            output: What `run` returned.
            targets: Token ids `[B, T]` int32.
        """
        return log_prob_of(self.logits(output), targets)

    def __call__(self, tokens: AnyArray, mask: AnyArray | None = None) -> jax.Array:
        """Logits `[B, T, V]` float32, teacher-forced.

        Args:
            tokens: Token ids `[B, T]` int32.
            mask: Whether each token is real, `[B, T]` bool; all by default. Padding may stand on
                either side; its logits are 0, and it does not change those of real tokens.
        """
        if mask is None:
            return self.logits(self.run(tokens))
        aligned, length, rank = left_align(tokens, mask)
        return restore_alignment(self.logits(self.run(aligned, length)), mask, rank)

    def token_losses(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Teacher-forced negative log-likelihood of each next token of rows.

        Args:
            rows: Token ids `[B, T + 1]` int32; -1 is padding on the right, which is not a target.
            track: Whether to update `Tracked` variables from these rows, as in training.
            key: Random key of noise in training; None for no noise.

        Returns:
            Nats `[B, T]` float32, 0 for padding, and what `run` returned. Under `jit`, a row with
            padding in front of a token has NaN in all places, with gradient 0.

        Raises:
            ValueError: The rows are not integers `[B, T + 1]` with T >= 1, or (outside of `jit`) a
                row has padding in front of a token.
        """
        inputs, targets = next_tokens(rows)
        length = (inputs >= 0).sum(axis=1, dtype=jnp.int32)
        output = self.run(jnp.maximum(inputs, 0), length, track=track, key=key)
        log_prob = self.log_prob(output, jnp.maximum(targets, 0))
        return nats_of(log_prob, inputs, targets), output

    def loss(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Pretraining loss of rows, as a sum that can be added up over micro-batches and devices.

        Args:
            rows: Token ids `[B, T + 1]` int32; -1 is padding on the right, which is not a target.
            track: Whether to update `Tracked` variables from these rows, as in training.
            key: Random key of noise in training; None for no noise.

        Returns:
            Sum in nats, number of targets (both float32), and the sums of `statistics`.
        """
        nats, output = self.token_losses(rows, track=track, key=key)
        return nats.sum(), (rows[:, 1:] >= 0).sum(dtype=jnp.float32), self.statistics(output)

    @property
    def loss_by_token(self) -> bool:
        """Whether `loss` is the sum of `token_losses`, so that metrics can split it by rows."""
        return type(self).loss is Architecture.loss

    def advance(
        self, cache: Any, tokens: AnyArray, length: AnyArray, *, fresh: bool = False
    ) -> tuple[Any, Any]:
        """Append tokens to the rows of a cache.

        Args:
            cache: Cache that `init_cache` or `advance` returned.
            tokens: Token ids `[B, C]` int32, padded on the right.
            length: Number of real tokens in each row, `[B]` int32; 0 leaves a row as it is.
            fresh: Static promise that the cache is empty.

        Returns:
            Output for `logits_at`, in which position 0 is the first of `tokens`, and the new cache.
        """
        x = self.embed_tokens(jnp.asarray(tokens))
        return self.extend(cache, x, jnp.asarray(length), fresh=fresh)

    def for_decoding(self) -> Self:
        """Return the model in the form that decodes fastest; called once, before a loop."""
        return self

    def backbone(self) -> Any:
        """Return the model as a decoder over vectors, a `memgen.DecoderBackbone`."""
        return self

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]:
        """Linear layers that take an adapter, by name: stack shape, inputs, outputs (here none)."""
        return {}

    def apply_lora(self, adapter: Mapping[str, Any]) -> Any:
        """Return the model with adapters on layers of `lora_targets`; arrays are not copied."""
        raise ValueError(f"{type(self).__name__} has no linear layers that take an adapter")

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> Any:
        """Return the model with `deltas [*stack, inputs, outputs]` merged into `lora_targets`."""
        raise ValueError(f"{type(self).__name__} has no linear layers that take an adapter")

    @property
    def takes_positions(self) -> bool:
        """Whether `hidden_states` takes `positions` and `visible`, for packing and weaving."""
        return False

    @property
    def fork_policy(self) -> Any:
        """Policy of the fork layers; None for a model without fork layers."""
        return None

    def with_policy(self, policy: Any) -> Self:
        """Return the model with another fork policy; a ValueError if it has no fork layers."""
        raise ValueError(f"{type(self).__name__} has no fork layers: it takes no policy, {policy}")

    @property
    def cacheable(self) -> bool:
        """Whether decoding with a cache gives the results of a forward pass."""
        return self.config.causal

    def check_cacheable(self) -> None:
        """Raise a ValueError unless the model is `cacheable`."""
        if not self.cacheable:
            raise ValueError(f"{self.config} is not causal: it can't be decoded with a cache")

    # Statistics of training and evaluation.

    def statistics(self, output: Any) -> dict[str, jax.Array]:
        """Return sums over a batch, by name, from which `step_metrics` makes a run's metrics."""
        return {}

    def row_statistics(self, output: Any) -> dict[str, jax.Array]:
        """Return sums over each row, `[B]`, by name; evaluation reports them as NAME_per_token."""
        return {}

    @classmethod
    def tracked_statistics(cls, tracked: Any) -> dict[str, jax.Array]:
        """Return values of `Tracked` variables (an nnx.State), to be added to `statistics`."""
        return {}

    @classmethod
    def step_metrics(cls, config: Any, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Return metrics by name, numbers or lists, from `statistics` and `tracked_statistics`."""
        return {}

    @classmethod
    def step_histograms(cls, config: Any, sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return samples for histograms by name, from `statistics` and `tracked_statistics`."""
        return {}

    @classmethod
    def from_params(
        cls,
        config: Any,
        params: Mapping[Any, Any],
        constrain: Constrain | None = None,
        attend: Any = None,
        *,
        shardings: Callable[[Any], Any] | None = None,
    ) -> Self:
        """Create a model with given parameters, e.g. from `train.runs.checkpoint.load_params`.

        Args:
            config: Config that the parameters were made with.
            params: Nested dict of arrays as `nnx.to_pure_dict` gives it.
            constrain: Function that keeps residuals sharded, as in the constructor.
            attend: Attention function, as in the constructor.
            shardings: Function from the abstract nnx.State to its shardings; by default JAX arrays
                stay where they are and others go to the first device.

        Raises:
            ValueError: Names or shapes of `params` differ from those that the config asks for.
        """
        build = lambda: cls(config, rngs=nnx.Rngs(0), constrain=constrain, attend=attend)  # noqa: E731
        return with_params(build, params, shardings)


ARCHITECTURES: dict[str, type[Architecture]] = {}
"""Architecture classes by the names that configs and `--architecture` use."""


def architecture_of(config: Any) -> type[Architecture]:
    """Return the architecture class of a config.

    Raises:
        ValueError: Not exactly one entry of `ARCHITECTURES` has configs of this class.
    """
    return ARCHITECTURES[architecture_name(config)]


def architecture_name(config: Any) -> str:
    """Return the name of a config's architecture in `ARCHITECTURES`.

    Raises:
        ValueError: Not exactly one entry of `ARCHITECTURES` has configs of this class.
    """
    names = [name for name, entry in ARCHITECTURES.items() if type(config) is entry.config_class]
    if len(names) > 1:
        raise ValueError(
            f"the architectures {' and '.join(names)} share {type(config).__name__}: give each a "
            "config class of its own"
        )
    if names:
        return names[0]
    raise ValueError(
        f"{type(config).__name__} is the config of no architecture: put its module into "
        "thoughtbubbles.architecture.ARCHITECTURES, in a module that --plugin names"
    )
