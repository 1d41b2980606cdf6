"""NNX modules of a decoder block and of a fork layer: Attention, MLP, Block and Fork."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from thoughtbubbles import forking
from thoughtbubbles.architecture import Tracked
from thoughtbubbles.attention import Attend, attend
from thoughtbubbles.checks import check_config, check_floating, check_sizes, check_streams
from thoughtbubbles.config import ModelConfig
from thoughtbubbles.fork_cache import (
    ForkCache,
    KVSlots,
    advanced,
    at_start,
    check_next,
    init_fork_cache,
    with_wrong_rows,
    wrong_rows,
)
from thoughtbubbles.module import Module
from thoughtbubbles.placement import placed_beside
from thoughtbubbles.policies import PrefixRank
from thoughtbubbles.policy import Candidates, CausalPolicy, Policy, check_forced_keep, hook
from thoughtbubbles.positions import rotary_angles, rotate
from thoughtbubbles.quantisation import linear, unquantised
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.streams import Streams
from thoughtbubbles.weights import INIT_STD, Norm, adapted, plus_bias, vector
from thoughtbubbles.weights import weight as make_weight

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float

Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Geometry(ShortRepr):
    """RoPE angles and score factors of the streams, the same in all blocks between two fork layers.

    Attributes:
        cos: `[B, S, K/2]` float32 cosines of the RoPE angles.
        sin: `[B, S, K/2]` float32 sines of the RoPE angles.
        key_bias: `[B, S]` float32 bias that the logits of a key get in attention; None means 0.
        value_scale: `[B, S]` float32 factor of each attention value; None means 1.
        write_scale: `[B, S]` float32 factor of each stream's residual updates; None means 1.
    """

    cos: jax.Array
    sin: jax.Array
    key_bias: jax.Array | None = None
    value_scale: jax.Array | None = None
    write_scale: jax.Array | None = None

    @classmethod
    def of(cls, streams: Streams, config: ModelConfig, max_tokens: int | None = None) -> Geometry:
        """Compute the RoPE angles (App. D) and score factors (eqs. 8-10) of streams."""
        position, offset = streams.split_positions(config.fractional_positions)
        bound = max_tokens if streams.continued else streams.num_tokens
        sizes = config.head_width, config.rope_base, config.rope_scaling
        angles = rotary_angles(position, *sizes, offset=offset, bound=bound)
        if not streams.forked:
            return cls(*angles)
        width = config.head_width if config.score_bias == "head" else None
        score = streams.score()
        return cls(
            *angles,
            key_bias=streams.attention_bias(width) if config.key_bias else None,
            value_scale=score if config.value_scaling else None,
            write_scale=score if config.residual_scaling else None,
        )

    def where(self, rotary: jax.Array | bool | None) -> Geometry:
        """Return one block's geometry: RoPE angles are 0 if `rotary` is false, kept if None."""
        if rotary is None:
            return self
        return dataclasses.replace(
            self, cos=jnp.where(rotary, self.cos, 1.0), sin=jnp.where(rotary, self.sin, 0.0)
        )


class Attention(Module):
    """Causal score-attenuated multi-head or grouped-query attention over streams (eq. 8).

    Attributes:
        adapters: Mapping from linear layer (`q`, `k`, `v`, `o`) to its LoRA adapter, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        d, h, g, k = config.embed_dim, config.num_heads, config.kv_heads, config.head_width
        self.dtype = config.dtype
        weight = partial(make_weight, rngs, init=kernel_init, dtype=param_dtype)
        self.q = weight((d, h, k), ("embed", "heads", "head_dim"))
        self.k = weight((d, g, k), ("embed", "kv_heads", "head_dim"))
        self.v = weight((d, g, k), ("embed", "kv_heads", "head_dim"))
        out_std = INIT_STD / math.sqrt(2 * config.num_layers)
        self.o = weight((h, k, d), ("heads", "head_dim", "embed"), inputs=2, std=out_std)
        has_bias = config.biases in ("all", "qkv")
        zeros = lambda shape, *axes: vector(jnp.zeros(shape, param_dtype), axes)  # noqa: E731
        self.q_bias = zeros((h, k), "heads", "head_dim") if has_bias else None
        self.k_bias = zeros((g, k), "kv_heads", "head_dim") if has_bias else None
        self.v_bias = zeros((g, k), "kv_heads", "head_dim") if has_bias else None
        self.o_bias = zeros((d,), "embed") if config.biases == "all" else None
        qk_norm = partial(
            Norm, k, "rmsnorm", eps=config.norm_eps, axis="head_dim", param_dtype=param_dtype
        )
        self.q_norm = qk_norm() if config.qk_norm else None
        self.k_norm = qk_norm() if config.qk_norm else None
        self.adapters: Mapping[str, Any] | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "B S D"], geometry: Geometry, mix: Mix
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Return the residual update for normalised residuals `x`, and the aux value of `mix`."""
        query = self._project(x, "q", self.q_bias)
        key = self._project(x, "k", self.k_bias)
        value = self._project(x, "v", self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, geometry.cos, geometry.sin)
        key = rotate(key, geometry.cos, geometry.sin)
        if geometry.value_scale is not None:
            value = value * geometry.value_scale[..., None, None].astype(value.dtype)
        mixed, aux = mix(query, key, value)
        out = linear(mixed, self.o, self.dtype, inputs=2)
        out = adapted(out, mixed.reshape(*mixed.shape[:2], -1), self.adapters, "o")
        return plus_bias(out, self.o_bias), aux

    def _project(self, x, name, bias):
        y = linear(x, getattr(self, name), self.dtype)
        return plus_bias(adapted(y, x, self.adapters, name), bias)


class MLP(Module):
    """MLP of a block: `down(gelu(up(x)))`, or `down(silu(gate(x)) * up(x))` for SwiGLU.

    Attributes:
        adapters: Mapping from linear layer (`up`, `gate`, `down`) to its LoRA adapter, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        d, f = config.embed_dim, config.mlp_width
        self.dtype = config.dtype
        weight = partial(make_weight, rngs, init=kernel_init, dtype=param_dtype)
        zeros = lambda n, axis: vector(jnp.zeros((n,), param_dtype), (axis,))  # noqa: E731
        self.up = weight((d, f), ("embed", "mlp"))
        self.gate = weight((d, f), ("embed", "mlp")) if config.mlp == "swiglu" else None
        out_std = INIT_STD / math.sqrt(2 * config.num_layers)
        self.down = weight((f, d), ("mlp", "embed"), std=out_std)
        bias = config.biases == "all"
        self.up_bias = zeros(f, "mlp") if bias else None
        self.gate_bias = zeros(f, "mlp") if bias and self.gate is not None else None
        self.down_bias = zeros(d, "embed") if bias else None
        self.adapters: Mapping[str, Any] | None = nnx.data(None)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Return the residual update for normalised residuals `x`."""
        hidden = self._linear(x, "up", self.up_bias)
        if self.gate is None:
            hidden = jax.nn.gelu(hidden, approximate=True)
        else:
            hidden = jax.nn.silu(self._linear(x, "gate", self.gate_bias)) * hidden
        return self._linear(hidden, "down", self.down_bias)

    def _linear(self, x, name, bias):
        y = linear(x, getattr(self, name), self.dtype)
        return plus_bias(adapted(y, x, self.adapters, name), bias)


class Block(Module):
    """Pre-norm decoder block over streams.

    Each stream's score scales its updates by attention and MLP (arXiv 2510.00219, eqs. 9-10).

    Args:
        config: Sizes and options; its `dtype` is the dtype of the computation.
        rngs: PRNG keys to initialise the parameters.
        attend: Attention function, such as a kernel of `thoughtbubbles.kernels`.
        kernel_init: Initializer of all kernels, called with shape `(inputs, outputs)`. By default
            kernels are sampled from a normal distribution with standard deviation 0.02, or
            0.02 / sqrt(2 * num_layers) for the output projections `o` and `down`.
        param_dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        attend: Attend = attend,
        kernel_init: Initializer | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        check_config(config, ModelConfig)
        check_floating("param_dtype", param_dtype)
        self.config = config
        self.attend = attend
        options: Any = {"rngs": rngs, "kernel_init": kernel_init, "param_dtype": param_dtype}
        self.attention_norm = norm_of(config, param_dtype)
        self.attention = Attention(config, **options)
        self.mlp_norm = norm_of(config, param_dtype)
        self.mlp = MLP(config, **options)

    def __call__(self, streams: Streams, geometry: Geometry | None = None) -> Streams:
        """Apply the block; every stream keeps its slot.

        Args:
            streams: Streams before the block.
            geometry: RoPE angles and score factors of the streams; None computes both.

        Raises:
            ValueError: The input is not a `Streams`, or its width is not `embed_dim`.
        """
        check_streams(streams, self.config.embed_dim, "a block")
        if geometry is None:
            geometry = Geometry.of(streams, self.config)
        bias = geometry.key_bias
        return self.mixing(streams, geometry, lambda q, k, v: (self.attend(q, k, v, bias), None))[0]

    def mixing(self, streams: Streams, geometry: Geometry, mix: Mix) -> tuple[Streams, Any]:
        """Apply the block with `mix` as its attention function, such as attention over a KV cache.

        Args:
            streams: Streams before the block.
            geometry: RoPE angles and score factors of the streams.
            mix: Function of rotated queries `[B, S, H, K]`, rotated keys and scaled values (both
                `[B, S, G, K]`, `G` KV heads) that returns `[B, S, H, K]` and any aux value.

        Returns:
            Streams after the block, and the aux value of `mix`.
        """
        x = streams.x
        with jax.named_scope("attention"):
            update, aux = self.attention(self.attention_norm(x), geometry, mix)
            x = x + self._write(update, geometry)
        with jax.named_scope("mlp"):
            x = x + self._write(self.mlp(self.mlp_norm(x)), geometry)
        return streams.replace(x=x), aux

    def _write(self, update, geometry):
        if geometry.write_scale is None:
            return update
        return update * geometry.write_scale[..., None].astype(update.dtype)


class Fork(Module):
    """Fork layer: score the fork and keep candidates of each stream; a policy chooses which live.

    It computes eqs. 1-6 of arXiv 2510.00219. Scores are always computed in float32.

    Args:
        embed_dim: Width `D` of the residuals.
        policy: Policy that chooses the candidates to keep.
        norm: Kind of the norm before the linear layer that computes the scores.
        norm_eps: Epsilon of the norm.
        norm_bias: Whether the norm has a bias (LayerNorm only).
        embedding: Whether a learned vector is added to every fork; false only for ablations.
        forced_keep: Whether originals are always kept; false only for ablations.
        score_originals: Whether the keep score of originals is learned (the paper) instead of 1.
        gate: Initial value of a learned scalar that scales the scores of forks; None for no gate.
        rngs: PRNG keys to initialise the parameters.
        dtype: Dtype of the residuals after the fork layer; None keeps their dtype.
        param_dtype: Dtype of the parameters.
        kernel_init: Initializer of the score kernel, called with shape `(D, 2)`; by default normal
            with standard deviation 0.02.

    Raises:
        ValueError: `embed_dim` is below 1, `gate` is not positive, `norm` is unknown, a dtype is
            not floating-point, or the policy is invalid or does not allow `forced_keep=False`.
    """

    def __init__(
        self,
        embed_dim: int,
        policy: Policy = PrefixRank(),  # noqa: B008 (frozen)
        *,
        norm: Literal["layernorm", "rmsnorm"] = "layernorm",
        norm_eps: float = 1e-5,
        norm_bias: bool = True,
        embedding: bool = True,
        forced_keep: bool = True,
        score_originals: bool = False,
        gate: float | None = None,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer | None = None,
    ):
        check_sizes(embed_dim=embed_dim)
        if gate is not None and not 0 < gate < math.inf:
            raise ValueError(f"gate={gate} is not positive: choose e.g. 1e-9")
        check_floating("param_dtype", param_dtype)
        if dtype is not None:
            check_floating("dtype", dtype)
        check_forced_keep(policy, forced_keep, score_originals)
        self.policy, self.forced_keep = policy, forced_keep
        self.score_originals, self.dtype = score_originals, dtype
        self.norm = Norm(embed_dim, norm, bias=norm_bias, eps=norm_eps, param_dtype=param_dtype)
        self.score = make_weight(
            rngs, (embed_dim, 2), ("embed", "candidates"), init=kernel_init, dtype=param_dtype
        )
        noise = embed_dim**-0.5 * jax.random.normal(rngs.params(), (embed_dim,), jnp.float32)
        self.embedding = vector(noise.astype(param_dtype), ("embed",)) if embedding else None
        self.gate = None if gate is None else vector(jnp.asarray(gate, jnp.float32), ())
        tracked = hook(policy, "init_tracked")()
        self.threshold = None if tracked is None else Tracked(jnp.full((), tracked, jnp.float32))

    def __call__(
        self, streams: Streams, *, track: bool = False, key: jax.Array | None = None
    ) -> Streams:
        """Fork the streams; each row then has `min(2 * S, policy.capacity(T))` slots.

        Args:
            streams: Streams before the fork layer.
            track: Whether to update the threshold that the policy tracks, as in training.
            key: PRNG key for the policy's exploration in training; None does not explore.

        Raises:
            ValueError: The input is not a `Streams`, its width is not `embed_dim`, or it was
                started with `first`, after earlier tokens of its rows (use `extend`).
        """
        self._check(streams)
        if streams.continued:
            raise ValueError(
                "streams of Streams.start(..., first=...) follow earlier tokens, whose state this "
                "call does not have: fork them by Fork.extend (Fork.init_cache)"
            )
        candidates = self.candidates(streams)
        if track and self.threshold is not None:
            self.threshold[...] = hook(self.policy, "track")(candidates)
        chosen_by = candidates
        if key is not None:
            chosen_by = hook(self.policy, "explore")(candidates, key)
        keep = self.policy.keep(chosen_by)
        return self._fork(streams, candidates, keep, streams.num_tokens)

    def init_cache(self, batch: int, max_tokens: int, before: ForkCache | None = None) -> ForkCache:
        """Return the state of this fork layer before the first token, for `extend`.

        Args:
            batch: Number of rows.
            max_tokens: Maximum number of tokens in a row.
            before: State of the model's previous fork layer; None for the first fork layer.

        Raises:
            ValueError: The policy is not causal, a size is below 1, or `before` has other sizes.
        """
        return init_fork_cache(self.policy, batch, max_tokens, before)

    def extend(
        self, streams: Streams, cache: ForkCache, *, fresh: bool = False
    ) -> tuple[Streams, KVSlots, ForkCache]:
        """Fork the next tokens of rows whose earlier tokens were forked in previous calls.

        Calls on consecutive parts of a row give the same streams as one call on the whole row.
        Under `jit`, where lengths are unknown, a row gets NaN residuals, in all later calls too, if
        it outgrows the cache or `streams.first` is not its number of cached tokens.

        Args:
            streams: Streams of the next tokens (`Streams.start` with `first`).
            cache: State after the earlier tokens.
            fresh: Static promise that there are no earlier tokens, which makes the call faster.

        Returns:
            Streams after the fork layer, their slots in the KV caches of the following blocks, and
            the state of the fork layer after these tokens.

        Raises:
            ValueError: The streams do not continue the cached rows, the cache is too small, or the
                cache was made for another fork layer.
        """
        self._check(streams)
        check_next(self.policy, streams, cache, fresh)
        wrong = wrong_rows(streams, cache, fresh)
        return with_wrong_rows(wrong, *self.advance(streams, cache, fresh=fresh))

    def advance(
        self, streams: Streams, cache: ForkCache, *, fresh: bool = False
    ) -> tuple[Streams, KVSlots, ForkCache]:
        """Do the same as `extend` without its checks; the caller has checked the lengths."""
        candidates, cache = self.candidates(streams), placed_beside(cache, streams.x)
        policy, state, num_tokens = cast(CausalPolicy, self.policy), cache.state, cache.max_tokens
        if fresh:
            # A state that is just large enough for these tokens: ranking scans the whole state.
            num_tokens = min(streams.num_tokens, num_tokens)
            state = placed_beside(policy.init_state(*candidates.token.shape), streams.x)
        keep, state = policy.keep_next(candidates, state)
        if fresh:
            state = jax.tree.map(at_start, cache.state, state)
        return advanced(cache, self._fork(streams, candidates, keep, num_tokens), state)

    def _check(self, streams: Streams) -> None:
        check_streams(streams, unquantised(self.score.get_value()).shape[0], "a fork layer")

    def candidates(self, streams: Streams) -> Candidates:
        """Compute the scores of each stream's fork and keep candidates, the input of the policy."""
        # Norm and scores are computed in float32, because bfloat16 scores would often tie.
        hidden = self.norm(streams.x.astype(jnp.float32))
        score = unquantised(self.score.get_value()).astype(jnp.float32)
        logits = jnp.einsum("bsd,dc->bsc", hidden, score, precision=jax.lax.Precision.HIGHEST)
        gate = None if self.gate is None else self.gate[...]
        log_scores = forking.candidate_log_scores(logits, streams.log_score, gate)
        threshold = None if self.threshold is None else self.threshold[...]
        candidates = forking.candidates_of(streams, log_scores, self.forced_keep, threshold)
        if self.score_originals:
            return candidates
        log_scores = jnp.where(candidates.forced, 0.0, log_scores)
        return dataclasses.replace(candidates, log_score=log_scores)

    def _fork(self, streams: Streams, candidates: Candidates, keep: jax.Array, num_tokens: int):
        plan = forking.compact(keep, min(keep.shape[1], self.policy.capacity(num_tokens)))
        log_scores = hook(self.policy, "scores")(candidates)
        embedding = None if self.embedding is None else self.embedding[...]
        if self.dtype is not None:
            streams = streams.replace(x=streams.x.astype(self.dtype))
        return forking.fork(streams, log_scores, plan, embedding)


def norm_of(config: ModelConfig, param_dtype: Dtype = jnp.float32) -> Norm:
    """Make a norm over residuals, LayerNorm or RMSNorm as the config says."""
    bias, eps = config.biases == "all", config.norm_eps
    return Norm(config.embed_dim, config.norm, bias=bias, eps=eps, param_dtype=param_dtype)
