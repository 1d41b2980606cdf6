"""Forward pass of a forking decoder: embedding, blocks and fork layers, merge, LM head."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.core import Tracer

from thoughtbubbles import fork_models
from thoughtbubbles.architecture import Architecture, Constrain
from thoughtbubbles.attention import Attend
from thoughtbubbles.attention import attend as attend_by_scores
from thoughtbubbles.checks import (
    check_config,
    check_floating,
    check_ids,
    check_integers,
    check_streams,
    check_targets,
)
from thoughtbubbles.config import ModelConfig
from thoughtbubbles.forking import merge, merge_log_prob, merge_log_probs
from thoughtbubbles.head import head_log_prob, head_logits, head_loss, num_parts
from thoughtbubbles.layers import Block, Fork, Geometry, Mix, norm_of
from thoughtbubbles.placement import AnyArray, embedding_rows, is_sharded
from thoughtbubbles.policy import Policy
from thoughtbubbles.quantisation import Int8Weight
from thoughtbubbles.recompute import POLICIES, recomputed
from thoughtbubbles.rows import next_tokens, padded_in_front, real_ids
from thoughtbubbles.sampling import log_prob_of
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.sites import Visit, plan_of
from thoughtbubbles.streams import Streams
from thoughtbubbles.transposed import TransposedKernel
from thoughtbubbles.weights import weight, without_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Output(ShortRepr):
    """Result of a forward pass.

    Attributes:
        streams: Streams after the last block, in left-aligned rows.
        forks: Streams after each fork layer, for statistics and bubble maps.
    """

    streams: Streams
    forks: tuple[Streams, ...]


class ForkingDecoder(Architecture):
    """Base class of `Thoughtbubbles` with the forward pass, but without caches and statistics.

    Attributes:
        config: Sizes and options of the model.
        blocks: Blocks stacked on a leading `layers` axis; None in a result of `for_decoding`.
        unstacked: List of single blocks in a result of `for_decoding`, otherwise None.
    """

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        constrain: Constrain | None = None,
        attend: Attend | None = None,
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        check_config(config, ModelConfig)
        check_floating("param_dtype", param_dtype)
        self.config = config
        self.constrain = constrain or _identity
        attend = attend or attend_by_scores
        shape = config.vocab_size, config.embed_dim
        self.embed = weight(rngs, shape, ("vocab", "embed"), dtype=param_dtype)
        options: Any = {"kernel_init": kernel_init, "param_dtype": param_dtype}
        make = lambda rngs: Block(config, rngs=rngs, attend=attend, **options)  # noqa: E731
        make_stack = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})
        self.blocks: Block | None = make_stack(rngs.split(config.num_layers))
        self.forks = nnx.List([_fork_of(config, rngs, **options) for _ in config.fork_layers])
        self.final_norm = norm_of(config, param_dtype)
        head = partial(weight, rngs, shape[::-1], ("embed", "vocab"))
        self.head = None if config.tied_head else head(init=kernel_init, dtype=param_dtype)
        self.unstacked = nnx.data(None)

    def run(
        self,
        tokens: AnyArray,
        length: AnyArray | None = None,
        *,
        track: bool = False,
        key: jax.Array | None = None,
    ) -> Output:
        """Run all blocks and fork layers over rows of tokens, without the merge and the head.

        Args:
            tokens: Token ids `[B, T]` int32, padded on the right; an id outside the vocabulary
                gives NaN.
            length: Number of real tokens in each row, `[B]` int32; all `T` by default.
            track: Whether to update tracked thresholds from these tokens, as in training.
            key: PRNG key of the policy's exploration in training (`PolicyDefaults.explore`); None
                for no exploration.

        Raises:
            ValueError: The ids are not `[B, T]` integers, or the lengths are not `[B]` integers
                from 0 to `T`.
        """
        check_ids(tokens)
        x = self.embed_tokens(real_ids(tokens, length))
        return self.run_residuals(x, length, track=track, key=key)

    def run_residuals(
        self,
        x: jax.Array,
        length: AnyArray | None = None,
        *,
        track: bool = False,
        key: jax.Array | None = None,
        visit: Visit | None = None,
    ) -> Output:
        """Run all blocks and fork layers over rows of vectors, such as embedded tokens.

        Args:
            x: Vectors `[B, T, D]`, padded on the right.
            length: Number of real vectors in each row, `[B]` int32; all `T` by default.
            track: Whether to update tracked thresholds from these vectors, as in training.
            key: PRNG key of the policy's exploration in training; None for no exploration.
            visit: Function that captures, and may edit, the streams at each of the `sites`.

        Raises:
            ValueError: The vectors are not floats `[B, T, D]`, or the lengths are not `[B]`
                integers from 0 to `T`.
        """
        config = self.config
        streams = Streams.start(self.constrain(x), length, config.copies)
        check_streams(streams, config.embed_dim, "a model")
        streams = streams if visit is None else visit("embed", streams)
        forks = []
        for index, (start, end) in enumerate(config.groups()):
            if index:
                own = None if key is None else jax.random.fold_in(key, index)
                before, fork = streams, self.forks[index - 1]
                streams = fork(before, track=track, key=own)
                streams = streams.replace(x=self.constrain(streams.x))
                if visit is not None:
                    streams = visit(f"fork_{start}", streams, plan_of(fork, before))
                forks.append(streams)
            streams = self.run_blocks(streams, start, end, visit=visit)
        return Output(streams, tuple(forks))

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order of the forward pass.

        `embed` is the input of the first layer, `fork_i` the output of the fork layer before block
        `i`, and `block_i` the output of block `i`. Merge and final norm follow the last site.
        """
        names = ["embed"]
        for layer in range(self.config.num_layers):
            names += [f"fork_{layer}"] * (layer in self.config.fork_layers) + [f"block_{layer}"]
        return tuple(names)

    def run_sites(self, inputs: jax.Array, length: AnyArray | None, visit: Visit) -> Output:
        """Run a forward pass that calls `visit` at each site (`SitedModel.run_sites`)."""
        if jnp.ndim(inputs) != 3:
            check_ids(inputs)
            inputs = self.embed_tokens(real_ids(inputs, length))
        return self.run_residuals(inputs.astype(self.config.dtype), length, visit=visit)

    def embed_tokens(self, tokens: AnyArray) -> jax.Array:
        """Embed token ids `[...]` as vectors `[..., D]`; NaN for an id outside the vocabulary."""
        check_integers(tokens)
        if isinstance(self.embed, Int8Weight):
            return self.embed.rows(jnp.asarray(tokens)).astype(self.config.dtype)
        return embedding_rows(self.embed[...], tokens).astype(self.config.dtype)

    def logits(self, output: Output | Streams) -> jax.Array:
        """Compute logits `[B, T, V]` float32, or log-probabilities if `merge` mixes predictions."""
        streams = _streams_of(output)
        if self.config.merge == "probability" and streams.forked:
            log_probs = jax.nn.log_softmax(self.decode(streams.x), axis=-1)
            return merge_log_probs(streams, log_probs, self.max_bubble(streams))
        return self.decode(self.merged(streams))

    def merged(self, streams: Streams) -> jax.Array:
        """Merge the streams of each token into one residual, `[B, T, D]`.

        Raises:
            ValueError: The streams have forked, and the model merges predictions
                (`merge="probability"`) instead of residuals.
        """
        if self.config.merge == "probability" and streams.forked:
            raise ValueError(
                "merge='probability' mixes predictions, a token has no one residual: "
                "use a model with merge='residual' or 'rightmost'"
            )
        kind = "rightmost" if self.config.merge == "rightmost" else "residual"
        return merge(streams, kind, self.max_bubble(streams))

    def logits_at(self, output: Output | Streams, position: AnyArray) -> jax.Array:
        """Compute logits `[B, V]` float32 at one position of each row, `position [B]` int32."""
        streams = _streams_of(output)
        return self.logits(streams.bubble_of(position, self.max_bubble(streams)))[:, 0]

    def decode(self, x: jax.Array) -> jax.Array:
        """Apply final norm and LM head to residuals `[..., D]`: logits `[..., V]` float32."""
        return self.unembed(self.final_norm(x))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Apply the LM head to normalised hidden states `[..., D]`: logits `[..., V]` float32."""
        table, vocab_axis = self._table()
        if isinstance(table, Int8Weight | TransposedKernel):
            return table(hidden).astype(jnp.float32)
        return head_logits(hidden, table[...].astype(self.config.dtype), vocab_axis=vocab_axis)

    def log_prob(self, output: Output | Streams, targets: AnyArray) -> jax.Array:
        """Compute the log-probabilities `[B, T]` float32 of `targets [B, T]`.

        The log-probability of a target outside the vocabulary is NaN, with a gradient of 0.
        With `merge="probability"` only the log-probabilities of targets are mixed. If the logits
        would be large, the LM head processes the vocabulary in chunks (`head.head_log_prob`),
        except with an int8 head or in a subclass that overrides `logits`, `decode` or `unembed`.

        Raises:
            ValueError: The targets are not `[B, T]` integers.
        """
        streams = _streams_of(output)
        targets = jnp.asarray(targets)
        check_targets(targets, (streams.token.shape[0], streams.num_tokens))
        if not self._inherits("logits"):
            return super().log_prob(streams, targets)
        if self.config.merge != "probability" or not streams.forked:
            return self._decoded_log_prob(self.merged(streams), targets)
        per_stream = jnp.take_along_axis(targets, streams.token, axis=1)
        log_prob = self._decoded_log_prob(streams.x, per_stream)
        bound = self.max_bubble(streams)
        return merge_log_prob(streams, log_prob, self.config.vocab_size, bound)

    def _decoded_log_prob(self, x: jax.Array, targets: jax.Array) -> jax.Array:
        table, vocab_axis = self._table()
        if isinstance(table, TransposedKernel):
            table, vocab_axis = table.matrix, 0
        if isinstance(table, Int8Weight) or not self._inherits("decode", "unembed"):
            return log_prob_of(self.decode(x), targets)
        table = table[...].astype(self.config.dtype)
        return head_log_prob(self.final_norm(x), table, targets, vocab_axis=vocab_axis)

    def summed_loss(
        self, rows: AnyArray, *, track: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """As `Architecture.summed_loss`; on one device, large logits are computed once.

        `head.head_loss` computes their gradient in the forward pass. Not so with
        `merge="probability"`, and in a subclass that overrides what leads from rows to losses.
        """
        inputs, targets = next_tokens(rows)
        parts = self._loss_parts(inputs)
        if not parts:
            return super().summed_loss(rows, track=track, key=key)
        length = (inputs >= 0).sum(axis=1, dtype=jnp.int32)
        output = self.run(jnp.maximum(inputs, 0), length, track=track, key=key)
        hidden = self.final_norm(self.merged(_streams_of(output)))
        table, vocab_axis = self._table()
        wrong = padded_in_front(inputs, targets)
        total, nats = head_loss(
            hidden,
            table[...].astype(self.config.dtype),
            jnp.where(wrong[:, None], -1, targets),
            vocab_axis=vocab_axis,
            parts=parts,
        )
        total += jnp.where(wrong, jnp.nan, 0).sum()
        return total, jnp.where(wrong[:, None], jnp.nan, nats), output

    def _loss_parts(self, inputs: AnyArray) -> int:
        """Return the number of parts in which `head_loss` processes rows; 0 not to use it."""
        table, _ = self._table()
        own = "token_losses", "log_prob", "logits", "merged", "decode", "unembed"
        if isinstance(table, Int8Weight | TransposedKernel) or not self._inherits(*own):
            return 0
        forks = bool(self.config.fork_layers) or self.config.copies > 1
        mixes = forks and self.config.merge == "probability"
        # Sharding is no part of a type on `AxisType.Auto` axes, and may be that of other devices.
        one_device = jax.device_count() == 1 and self.constrain is _identity
        if mixes or not one_device or is_sharded(inputs) or is_sharded(table[...]):
            return 0
        batch, length = inputs.shape
        return num_parts(batch, length, self.config.vocab_size, self.config.embed_dim)

    def _table(self) -> tuple[Any, int]:
        """Return the kernel of the LM head, and the index of the kernel's vocabulary axis."""
        return (self.embed, 0) if self.head is None else (self.head, 1)

    def _inherits(self, *methods: str) -> bool:
        return all(getattr(type(self), name) is getattr(ForkingDecoder, name) for name in methods)

    def max_bubble(self, streams: Streams) -> int:
        """Static upper bound on the number of streams of one token."""
        bound = self.config.copies * 2 ** len(self.config.fork_layers)
        return min(bound, streams.token.shape[1])

    def layers(self) -> list[Block]:
        """Return the single blocks, whose parameters are copies unless the model is unstacked."""
        return self._layers(0, self.config.num_layers)

    def _layers(self, start: int, end: int) -> list[Block]:
        if self.unstacked is not None:
            return self.unstacked[start:end]
        return _unstack(self.blocks, start, end)

    def for_decoding(self) -> Self:
        """Return the model with a list of single blocks in place of the stack of blocks.

        With stacked blocks, a compiled program copies each block out of the stack whenever it runs.
        Outside of `jit` this method copies the blocks once, and a program that is given the
        returned model copies none.
        """
        if self.unstacked is not None:
            return self
        leaves, structure = jax.tree.flatten(self)
        model: Self = jax.tree.unflatten(structure, leaves)
        depth = self.config.num_layers
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            layers = self.layers()
        else:
            stacks, block = jax.tree.flatten(without_layers(self.blocks))
            layers = [[] for _ in range(depth)]
            for stack in stacks:
                for layer, row in zip(layers, _take_apart(stack), strict=True):
                    layer.append(row)
            layers = [jax.tree.unflatten(block, layer) for layer in layers]
        model.unstacked = nnx.data(layers)
        model.blocks = nnx.data(None)
        return model

    def with_policy(self, policy: Policy) -> Self:
        """Return a model with another fork policy, which shares this model's arrays, for inference.

        Raises:
            ValueError: The policy tracks a threshold, as `Threshold` does, and the fork layers have
                no threshold.
        """
        return fork_models.with_policy(self, policy)

    def run_blocks(
        self,
        streams: Streams,
        start: int,
        end: int,
        geometry: Geometry | None = None,
        mix: Mix | None = None,
        visit: Visit | None = None,
    ) -> Streams:
        """Run streams through blocks `start` to `end - 1`.

        Args:
            streams: Streams before block `start`.
            start: Index of the first block.
            end: Index of the last block plus 1.
            geometry: RoPE angles and score attenuation; computed from the streams by default.
            mix: Attention in place of the blocks' own (see `Block.mixing`).
            visit: Function that captures, and may edit, the streams after each block.
        """
        if start == end:
            return streams
        where = geometry or Geometry.of(streams, self.config)
        if visit is not None:
            for last in range(start, end):
                if visit.wants(f"block_{last}") or last == end - 1:
                    streams = self.run_blocks(streams, start, last + 1, where, mix)
                    streams, start = visit(f"block_{last}", streams), last + 1
            return streams

        def run(streams: Streams, layer: tuple[Block, Any], where: Geometry) -> Streams:
            block, rotary = layer
            here = where.where(rotary)
            streams = block.mixing(streams, here, mix)[0] if mix else block(streams, here)
            return streams.replace(x=self.constrain(streams.x))

        rotary = self.config.rotary_layers[start:end]
        remat = self.config.remat
        if self.config.scan_layers and self.unstacked is None:
            step = lambda streams, layer: (run(streams, layer, where), None)  # noqa: E731
            if remat != "none":
                step = jax.checkpoint(step, policy=POLICIES[remat], prevent_cse=False)
            stack = jax.tree.map(lambda leaf: leaf[start:end], self.blocks)
            flags = None if rotary[0] is None else jnp.array(rotary)
            return jax.lax.scan(step, streams, (stack, flags))[0]
        if remat != "none":
            again = jax.checkpoint if mix else recomputed  # `mix` may hold tracers
            run = again(run, policy=POLICIES[remat])
        for layer in zip(self._layers(start, end), rotary, strict=True):
            streams = run(streams, layer, where)
        return streams


@jax.jit
def _take_apart(stack: jax.Array) -> list[jax.Array]:
    return [row.squeeze(0) for row in jax.lax.split(stack, [1] * stack.shape[0])]


def _unstack(blocks: Block | None, start: int, end: int) -> list[Block]:
    leaves, structure = jax.tree.flatten(without_layers(blocks))
    # Split rather than index: its gradient is one concatenation, not a sum of padded slices.
    rows = [jax.lax.split(leaf[start:end], [1] * (end - start)) for leaf in leaves]
    layers = [[leaf[i].squeeze(0) for leaf in rows] for i in range(end - start)]
    return [jax.tree.unflatten(structure, layer) for layer in layers]


def _fork_of(config: ModelConfig, rngs: nnx.Rngs, **options: Any) -> Fork:
    return Fork(
        config.embed_dim,
        config.policy,
        norm=config.norm,
        norm_eps=config.norm_eps,
        norm_bias=config.biases == "all",
        embedding=config.fork_embedding,
        forced_keep=config.forced_keep,
        score_originals=config.score_originals,
        gate=config.fork_gate,
        rngs=rngs,
        **options,
    )


def _identity(x: jax.Array) -> jax.Array:
    return x


def _streams_of(output: Output | Streams) -> Streams:
    streams = output.streams if isinstance(output, Output) else output
    if not isinstance(streams, Streams):
        shape = getattr(streams, "shape", type(streams).__name__)
        raise ValueError(f"an output that is {shape}: give what run or advance returned")
    return streams
