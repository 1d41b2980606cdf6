"""Base classes of decoders and of their configs: the interface that all other packages use.

A new architecture is a config class, a module with five methods over batches of vectors, and an
entry in `ARCHITECTURES`. Training, evaluation, generation, MemGen and RL use only the methods of
`Architecture`; bubble maps and Hugging Face checkpoints are supported for `Thoughtbubbles` only.
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
from thoughtbubbles.registry import Registry
from thoughtbubbles.rows import left_align, nats_of, next_tokens, real_ids, restore_alignment
from thoughtbubbles.sampling import log_prob_of

Constrain = Callable[[jax.Array], jax.Array]


class Tracked(nnx.Variable):
    """Model state, such as a threshold, that training updates from batches, not by gradients."""


class ArchitectureConfig:
    """Base class of architecture configs: frozen dataclasses with JSON-serializable fields.

    `--architecture "name(field=value)"` sets fields that are numbers, strings, bools, tuples of
    these types, or None. A field of another type, such as a policy, has its own option `--model.*`.

    Attributes:
        vocab_size: Number of token ids of the embedding (V).
        embed_dim: Width of the model's input vectors and of its hidden states (D).
        context_length: Longest sequence, in tokens, that parameters are meant for; None if unknown.
        dtype: Dtype of the computation; parameters are float32 by default.
        scan_layers: Whether layers run in a scan, which compiles faster, if the model supports it.
        remat: Activations that the backward pass recomputes, if the model supports it.
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

        The default is two FLOPs for each parameter and token.
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
        """Names of fields without effect in this config; a resumed run may change their values."""
        return ()

    def attention_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...] | None:
        """Shapes of query, key, value and bias, to select a kernel; None if kernels don't apply."""
        return None


class Architecture(Module):
    """Base class of decoders: a subclass implements five methods, all other methods have defaults.

    A subclass implements the constructor, `embed_tokens`, `hidden_states`, `unembed`, and, to
    decode with a cache, `init_cache` and `extend`. A subclass that predicts from several hidden
    states per token overrides `run`, `logits`, `logits_at`, `log_prob`, `advance` and `backbone`.

    Parameters are `nnx.Param`s. Their metadata `axes` names their logical axes for sharding, and
    `inputs` is the number of leading axes that a matrix product contracts
    (`thoughtbubbles.weights.weight`). Parameters without metadata are replicated.

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
            rngs: PRNG keys of the initial values.
            constrain: Function that constrains residuals `[B, S, D]` to be sharded over the batch,
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

    # Methods that a subclass implements.

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embed token ids `[...]` int32 as vectors `[..., D]`."""
        raise NotImplementedError(f"{type(self).__name__} has no embed_tokens")

    def hidden_states(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Compute hidden states `[B, T, D]` of a forward pass over vectors, after the final norm.

        Args:
            x: Vectors `[B, T, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; all `T` by default.
            positions: Position of each vector, `[B, T]` int32, passed together with `visible` in
                place of `length`; only for an architecture with `takes_positions`.
            visible: Attention mask of queries (axis 1) and keys (axis 2), `[B, T, T]` bool.
        """
        raise NotImplementedError(f"{type(self).__name__} has no hidden_states")

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Compute logits `[..., V]` float32 from hidden states `[..., D]`."""
        raise NotImplementedError(f"{type(self).__name__} has no unembed")

    def init_cache(self, batch: int, max_tokens: int) -> Any:
        """Return an empty cache, a pytree of arrays with the batch on axis 0 (`cache_batch_axes`).

        Args:
            batch: Number of rows (batch elements).
            max_tokens: Maximum number of vectors in a row.
        """
        raise NotImplementedError(f"{type(self).__name__} can't decode with a cache")

    def cache_batch_axes(self, cache: Any) -> Any:
        """Return the batch axis of each array of a cache (same pytree); None for shared arrays."""
        return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, cache)

    def extend(
        self, cache: Any, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Any]:
        """Append vectors to the rows of a cache and return the hidden states of these vectors.

        Processing a sequence in chunks, however it is split, gives the same hidden states as one
        call of `hidden_states` over the whole sequence.

        Args:
            cache: Cache that `init_cache` or `extend` returned; it is neither modified nor donated.
            x: Next `C` vectors of each row, `[B, C, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; 0 leaves a row unchanged.
            fresh: Whether the cache is known to be empty (static), which allows a faster prefill.

        Returns:
            Hidden states `[B, C, D]` of the vectors, and the new cache.
        """
        raise NotImplementedError(f"{type(self).__name__} can't decode with a cache")

    # Methods with defaults.

    def run(
        self,
        tokens: AnyArray,
        length: AnyArray | None = None,
        *,
        track: bool = False,
        key: jax.Array | None = None,
    ) -> Any:
        """Run the forward pass up to the LM head; `logits` and `log_prob` take the result.

        Args:
            tokens: Token ids `[B, T]` int32, padded on the right.
            length: Number of real tokens in each row, `[B]` int32; all `T` by default.
            track: Whether to update `Tracked` variables from these tokens, as in training.
            key: PRNG key of noise in training; None for no noise.
        """
        x = self.embed_tokens(jnp.asarray(real_ids(tokens, length)))
        return self.hidden_states(x, None if length is None else jnp.asarray(length))

    def logits(self, output: Any) -> jax.Array:
        """Compute logits `[B, T, V]` float32 from the result of `run` or `advance`."""
        return self.unembed(output)

    def logits_at(self, output: Any, position: AnyArray) -> jax.Array:
        """Compute logits `[B, V]` float32 at one position in each row.

        Args:
            output: Result of `run` or `advance`.
            position: Position in each row, `[B]` int32.
        """
        return self.unembed(jnp.take_along_axis(output, position[:, None, None], axis=1))[:, 0]

    def log_prob(self, output: Any, targets: AnyArray) -> jax.Array:
        """Compute log-probabilities `[B, T]` float32 of `targets [B, T]` after `run`'s `output`."""
        return log_prob_of(self.logits(output), targets)

    def __call__(self, tokens: AnyArray, mask: AnyArray | None = None) -> jax.Array:
        """Compute logits `[B, T, V]` float32 in one teacher-forced forward pass.

        Args:
            tokens: Token ids `[B, T]` int32.
            mask: Whether each token is real, `[B, T]` bool; all by default. Padding, on either
                side, has logits of 0 and does not change the logits of real tokens.
        """
        if mask is None:
            return self.logits(self.run(tokens))
        aligned, length, rank = left_align(tokens, mask)
        return restore_alignment(self.logits(self.run(aligned, length)), mask, rank)

    def token_losses(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Compute the teacher-forced negative log-likelihood of each next token.

        Args:
            rows: Token ids `[B, T + 1]` int32; -1 is padding on the right, which is not a target.
            track: Whether to update `Tracked` variables from these rows, as in training.
            key: PRNG key of noise in training; None for no noise.

        Returns:
            Losses `[B, T]` float32 in nats, 0 for padding, and the result of `run`. The loss of a
            target outside the vocabulary is NaN. Under `jit`, all losses of a row with padding
            before a token are NaN, with a gradient of 0.

        Raises:
            ValueError: The rows are not integers `[B, T + 1]` with T >= 1, or (outside of `jit`) a
                row has padding before a token.
        """
        inputs, targets = next_tokens(rows)
        length = (inputs >= 0).sum(axis=1, dtype=jnp.int32)
        output = self.run(jnp.maximum(inputs, 0), length, track=track, key=key)
        log_prob = self.log_prob(output, jnp.maximum(targets, 0))
        return nats_of(log_prob, inputs, targets), output

    def summed_loss(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Compute the sum of `token_losses`, whose gradient may cost less than theirs.

        Arguments and errors are those of `token_losses`.

        Returns:
            Sum in nats, float32; the losses of the tokens `[B, T]`, which have no gradient; and the
            result of `run`.
        """
        nats, output = self.token_losses(rows, track=track, key=key)
        return nats.sum(), jax.lax.stop_gradient(nats), output

    def loss(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Compute the pretraining loss as a sum, to be added over micro-batches and devices.

        Arguments and errors are those of `token_losses`.

        Returns:
            Summed loss in nats, number of targets (both float32), and the result of `statistics`.
        """
        nats, _, output = self.summed_loss(rows, track=track, key=key)
        return nats, (rows[:, 1:] >= 0).sum(dtype=jnp.float32), self.statistics(output)

    @property
    def loss_by_token(self) -> bool:
        """Whether `loss` is that of `summed_loss`, so that metrics can split it by rows."""
        return type(self).loss is Architecture.loss

    def advance(
        self, cache: Any, tokens: AnyArray, length: AnyArray, *, fresh: bool = False
    ) -> tuple[Any, Any]:
        """Append tokens to the rows of a cache.

        Args:
            cache: Cache that `init_cache` or `advance` returned.
            tokens: Token ids `[B, C]` int32, padded on the right.
            length: Number of real tokens in each row, `[B]` int32; 0 leaves a row unchanged.
            fresh: Whether the cache is known to be empty (static), which allows a faster prefill.

        Returns:
            Output for `logits_at`, whose position 0 is the first of `tokens`, and the new cache.
        """
        x = self.embed_tokens(jnp.asarray(real_ids(tokens, length)))
        return self.extend(cache, x, jnp.asarray(length), fresh=fresh)

    def for_decoding(self) -> Self:
        """Return the model in the form that decodes fastest; called once, before a loop."""
        return self

    def backbone(self) -> Any:
        """Return the model as a decoder over vectors, a `memgen.DecoderBackbone`."""
        return self

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]:
        """Mapping from a linear layer that takes an adapter to (stack shape, inputs, outputs)."""
        return {}

    def apply_lora(self, adapter: Mapping[str, Any]) -> Any:
        """Return the model with adapters, keyed as `lora_targets`; arrays are not copied."""
        raise ValueError(f"{type(self).__name__} has no linear layers that take an adapter")

    def merge_lora(self, deltas: Mapping[str, jax.Array]) -> Any:
        """Return the model with `deltas`, `[*stack, inputs, outputs]`, added to its kernels."""
        raise ValueError(f"{type(self).__name__} has no linear layers that take an adapter")

    @property
    def takes_positions(self) -> bool:
        """Whether `hidden_states` takes `positions` and `visible` (sequence packing, weaving)."""
        return False

    @property
    def fork_policy(self) -> Any:
        """Policy of the fork layers; None for a model without fork layers."""
        return None

    def with_policy(self, policy: Any) -> Self:
        """Return the model with another fork policy; raise a ValueError without fork layers."""
        raise ValueError(f"{type(self).__name__} has no fork layers: it takes no policy, {policy}")

    @property
    def cacheable(self) -> bool:
        """Whether decoding with a cache gives the results of a forward pass."""
        return self.config.causal

    def check_cacheable(self) -> None:
        """Raise a ValueError unless the model is `cacheable`."""
        if not self.cacheable:
            raise ValueError(f"{self.config} is not causal: it can't be decoded with a cache")

    def statistics(self, output: Any) -> dict[str, jax.Array]:
        """Return sums over a batch, keyed by name, from which `step_metrics` computes metrics."""
        return {}

    def row_statistics(self, output: Any) -> dict[str, jax.Array]:
        """Return sums over each row, `[B]`, keyed by name; reported as NAME_per_token."""
        return {}

    @classmethod
    def tracked_statistics(cls, tracked: Any) -> dict[str, jax.Array]:
        """Return statistics, keyed by name, of an nnx.State of `Tracked` variables."""
        return {}

    @classmethod
    def step_metrics(cls, config: Any, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Compute metrics, keyed by name, from sums of `statistics` and `tracked_statistics`."""
        return {}

    @classmethod
    def step_histograms(cls, config: Any, sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Compute samples for TensorBoard histograms, keyed by name, from the same sums."""
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
            params: Nested dict of arrays, as `nnx.to_pure_dict` returns it.
            constrain: Function that constrains residuals, as in the constructor.
            attend: Attention function, as in the constructor.
            shardings: Function from the abstract nnx.State to its shardings; by default JAX arrays
                are not moved, and other arrays go to the default device.

        Raises:
            ValueError: Names or shapes of `params` differ from those that the config asks for.
        """
        build = lambda: cls(config, rngs=nnx.Rngs(0), constrain=constrain, attend=attend)  # noqa: E731
        return with_params(build, params, shardings)


ARCHITECTURES = Registry[Architecture]("architecture", {})
"""Mapping from a name in configs and in `--architecture` to the architecture class."""


def architecture_of(config: Any) -> type[Architecture]:
    """Return the architecture class of a config, whose name is as `architecture_name` finds it."""
    return ARCHITECTURES[architecture_name(config)]


def architecture_name(config: Any) -> str:
    """Return the name of a config's architecture in `ARCHITECTURES`.

    Raises:
        ValueError: Not exactly one entry of `ARCHITECTURES` has configs of this class.
    """
    names = [name for name, entry in ARCHITECTURES.items() if type(config) is entry.config_class]
    if len(names) == 1:
        return names[0]
    if names:
        raise ValueError(
            f"the architectures {' and '.join(names)} share {type(config).__name__}: give each a "
            "config class of its own"
        )
    raise ValueError(
        f"{type(config).__name__} is the config of no architecture: put its module into "
        "thoughtbubbles.architecture.ARCHITECTURES, in a module that --plugin names"
    )
