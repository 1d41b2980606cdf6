"""The architecture seam: what a decoder offers to training, evaluation, generation, memory and RL.

A new architecture is a config, a module with five methods over rows of vectors, and an entry in
`ARCHITECTURES`. Bubble maps, fork policies and pretrained weights are `Thoughtbubbles`' own; all
else uses the methods of `Architecture` alone.
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
    """Model state that follows statistics of training; not a parameter, fixed otherwise."""


class ArchitectureConfig:
    """Base of the configs of architectures, which are frozen dataclasses of JSON values.

    A config can be written as `name(field=value, ...)`, so each field is a number, a text, a bool,
    a tuple of these, or None.

    Attributes:
        vocab_size: Number of token ids that the embedding knows (V).
        embed_dim: Width of the vectors that the model reads and of its hidden states (D).
        context_length: Number of tokens at a time that the weights were made for, if known.
        dtype: Type of the computation; parameters are float32.
        scan_layers: Whether layers are scanned, which compiles faster, where that can be chosen.
        remat: What the backward pass recomputes, where that can be chosen.
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
    """Fields that change how a result is computed, not which; runs and caches go on with others."""

    @property
    def causal(self) -> bool:
        """Whether logits of a position depend on tokens up to it alone, by construction."""
        return True

    def num_params(self) -> int:
        """Number of parameters of the model."""
        model = abstract_module(lambda: architecture_of(self)(self, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    def forward_flops(self, num_tokens: int) -> int:
        """Matrix-multiplication FLOPs of a forward pass over one row, logits included.

        The default takes every parameter to be used once for each token.

        Args:
            num_tokens: Number of tokens in the row.
        """
        return 2 * self.num_params() * num_tokens

    def recomputed_flops(self, num_tokens: int) -> int:
        """FLOPs that the backward pass of one row spends on computing forward results again.

        Args:
            num_tokens: Number of tokens in the row.
        """
        return 0

    def summary(self) -> str:
        """What distinguishes the model, in a few words of the first line of a run."""
        return type(self).__name__

    def sizes(self) -> str:
        """Sizes of the model in one line."""
        return ", ".join(f"{name} {getattr(self, name)}" for name in self.__dataclass_fields__)

    def unused_fields(self) -> tuple[str, ...]:
        """Names of the fields that change nothing here and may differ when a run is resumed."""
        return ()

    def attention_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...] | None:
        """Shapes of query, key, value and bias of one attention call, from which a kernel is
        chosen; None for a model whose attention takes no kernel of others."""
        return None


class Architecture(Module):
    """Base of decoders: five methods to write, and all that follows from them.

    To write are the constructor, `embed_tokens`, `hidden_states`, `unembed`, and, for decoding with
    a cache, `init_cache` and `extend`. The rest follows from these; an architecture whose
    prediction is not made of one hidden state per token overrides `run`, `logits`, `logits_at`,
    `log_prob` and `advance` instead, and returns another `backbone`.

    Parameters are `nnx.Param`s; the metadata `axes` names their logical axes for sharding and
    `inputs` counts the leading axes that a product contracts (`thoughtbubbles.weights.weight`).
    Parameters without metadata are replicated.

    Attributes:
        config: Config that the model was made with.
        config_class: Class of such configs.
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
        """Make the parameters.

        Args:
            config: Sizes and options, a `config_class`.
            rngs: Keys of the initial values.
            constrain: Function that keeps residuals `[B, S, D]` sharded over the batch, to be
                applied between blocks; None on one device.
            attend: Attention of the devices (`thoughtbubbles.attention.Attend`), for
                architectures with `attention_inputs`; None for their own.
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
            positions: Position of each vector, `[B, T]` int32, in place of `length` and together
                with `visible`; only for an architecture with `takes_positions`.
            visible: Whether each position sees each other one, `[B, T, T]` bool.
        """
        raise NotImplementedError(f"{type(self).__name__} has no hidden_states")

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits `[..., V]` float32 of hidden states `[..., D]`."""
        raise NotImplementedError(f"{type(self).__name__} has no unembed")

    def init_cache(self, batch: int, max_tokens: int) -> Any:
        """An empty cache: a pytree whose arrays have the rows on axis 0 (see `cache_batch_axes`).

        Args:
            batch: Number of rows.
            max_tokens: Number of vectors that fit into a row.
        """
        raise NotImplementedError(f"{type(self).__name__} can't decode with a cache")

    def cache_batch_axes(self, cache: Any) -> Any:
        """Axis of the rows in each array of a cache, None for an array that all rows share."""
        return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, cache)

    def extend(
        self, cache: Any, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Any]:
        """Append vectors to the rows of a cache; any split into calls gives `hidden_states`.

        Args:
            cache: From `init_cache` or `extend`; it stays usable.
            x: Vectors `[B, C, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; a row of 0 stays as it is.
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
        """A forward pass without the head; its result is what `logits` and the like take.

        Args:
            tokens: Token ids `[B, T]` int32, padded on the right.
            length: Number of real tokens in each row, `[B]` int32; all `T` by default.
            track: Whether `Tracked` variables follow these tokens, as in training.
            key: Key of the noise of training; no noise by default.
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
        """Log-probabilities `[B, T]` float32 of one target for each position.

        Args:
            output: What `run` returned.
            targets: Token ids `[B, T]` int32.
        """
        return log_prob_of(self.logits(output), targets)

    def __call__(self, tokens: AnyArray, mask: AnyArray | None = None) -> jax.Array:
        """Logits `[B, T, V]` float32, teacher-forced.

        Args:
            tokens: Token ids `[B, T]` int32.
            mask: Whether each token is real, `[B, T]` bool; padding, on either side, changes
                nothing of real positions and gets zeros.
        """
        if mask is None:
            return self.logits(self.run(tokens))
        aligned, length, rank = left_align(tokens, mask)
        return restore_alignment(self.logits(self.run(aligned, length)), mask, rank)

    def token_losses(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Teacher-forced negative log-likelihoods of rows.

        Args:
            rows: Token ids `[B, T + 1]` int32; -1 for padding on the right, which is no target.
            track: As in `run`.
            key: As in `run`.

        Returns:
            Nats `[B, T]` float32 of each next token, 0 for padding, NaN (gradient 0) in rows padded
            in front of a token, an error outside of `jit`; and what `run` returned.
        """
        inputs, targets = next_tokens(rows)
        length = (inputs >= 0).sum(axis=1, dtype=jnp.int32)
        output = self.run(jnp.maximum(inputs, 0), length, track=track, key=key)
        log_prob = self.log_prob(output, jnp.maximum(targets, 0))
        return nats_of(log_prob, inputs, targets), output

    def loss(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """The pretraining loss of rows as a sum, so that micro-batches and devices add up.

        Args:
            rows: Token ids `[B, T + 1]` int32; -1 for padding on the right, which is no target.
            track: As in `run`.
            key: As in `run`.

        Returns:
            Sum in nats, number of targets (float32), and sums for `step_metrics`.
        """
        nats, output = self.token_losses(rows, track=track, key=key)
        return nats.sum(), (rows[:, 1:] >= 0).sum(dtype=jnp.float32), self.statistics(output)

    @property
    def loss_by_token(self) -> bool:
        """Whether `loss` is the sum of `token_losses`, which metrics can then split by rows."""
        return type(self).loss is Architecture.loss

    def advance(
        self, cache: Any, tokens: AnyArray, length: AnyArray, *, fresh: bool = False
    ) -> tuple[Any, Any]:
        """`extend` by tokens.

        Args:
            cache: From `init_cache` or `advance`.
            tokens: Token ids `[B, C]` int32, padded on the right.
            length: Number of real tokens in each row, `[B]` int32; a row of 0 stays as it is.
            fresh: Static promise that the cache is empty.

        Returns:
            What `logits_at` takes, whose position 0 is the first of `tokens`, and the new cache.
        """
        x = self.embed_tokens(jnp.asarray(tokens))
        return self.extend(cache, x, jnp.asarray(length), fresh=fresh)

    def for_decoding(self) -> Self:
        """The model in the form that decodes fastest, made outside of the loop; it is not saved."""
        return self

    def backbone(self) -> Any:
        """The model as a decoder over vectors, as `memgen.DecoderBackbone` describes it."""
        return self

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]:
        """Linear layers that adapters can be added to; none by default."""
        return {}

    def apply_lora(self, adapter: Mapping[str, Any]) -> Any:
        """The model with an adapter added to its linear layers, without copying arrays."""
        raise ValueError(f"{type(self).__name__} has no linear layers that take an adapter")

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> Any:
        """The model with `deltas` added to its linear layers: `[*stack, inputs, outputs]` each."""
        raise ValueError(f"{type(self).__name__} has no linear layers that take an adapter")

    @property
    def takes_positions(self) -> bool:
        """Whether `hidden_states` takes `positions` and `visible`, for packing and weaving."""
        return False

    @property
    def fork_policy(self) -> Any:
        """The policy of fork layers; None for a model that has none."""
        return None

    def with_policy(self, policy: Any) -> Self:
        """The same arrays under another fork policy; a ValueError if there are no fork layers."""
        raise ValueError(f"{type(self).__name__} has no fork layers: it takes no policy, {policy}")

    @property
    def cacheable(self) -> bool:
        """Whether decoding with a cache gives what a forward pass gives."""
        return self.config.causal

    def check_cacheable(self) -> None:
        """Raise a ValueError unless the model is `cacheable`."""
        if not self.cacheable:
            raise ValueError(f"{self.config} is not causal: it can't be decoded with a cache")

    # Statistics of training and evaluation.

    def statistics(self, output: Any) -> dict[str, jax.Array]:
        """Sums over a batch of what the run's metrics show, of what `run` returned."""
        return {}

    def row_statistics(self, output: Any) -> dict[str, jax.Array]:
        """Sums over each row, `[B]`; held-out metrics show them per token as `NAME_per_token`."""
        return {}

    @classmethod
    def tracked_statistics(cls, tracked: Any) -> dict[str, jax.Array]:
        """What metrics show of `Tracked` variables, an nnx.State, in addition to `statistics`."""
        return {}

    @classmethod
    def step_metrics(cls, config: Any, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics by name, numbers or lists, of `statistics` and `tracked_statistics`."""
        return {}

    @classmethod
    def step_histograms(cls, config: Any, sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Samples by name, for histograms, of `statistics` and `tracked_statistics`."""
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
        """A model with given parameters, e.g. from `train.runs.checkpoint.load_params`.

        Args:
            config: Config that the parameters were made with.
            params: Nested dict of arrays as `nnx.to_pure_dict` gives it.
            constrain: As in the constructor.
            attend: As in the constructor.
            shardings: Function from the abstract nnx.State to its shardings; by default JAX arrays
                stay where they are and others go to the first device.

        Raises:
            ValueError: Names or shapes differ from what the config asks for.
        """
        build = lambda: cls(config, rngs=nnx.Rngs(0), constrain=constrain, attend=attend)  # noqa: E731
        return with_params(build, params, shardings)


ARCHITECTURES: dict[str, type[Architecture]] = {}
"""Architectures by the name that configs and `--architecture` call them."""


def architecture_of(config: Any) -> type[Architecture]:
    """The architecture of a config.

    Raises:
        ValueError: Not exactly one entry of `ARCHITECTURES` has configs of this class.
    """
    return ARCHITECTURES[architecture_name(config)]


def architecture_name(config: Any) -> str:
    """The name under which `ARCHITECTURES` holds the architecture of a config.

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
