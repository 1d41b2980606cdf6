"""Config of `Thoughtbubbles` models: sizes, ablations, presets, parameter and FLOP counts."""

import dataclasses
import math
from typing import Literal, TypedDict, Unpack

import jax

from thoughtbubbles.architecture import ArchitectureConfig
from thoughtbubbles.attention import (
    KEY_TILE,
    LARGEST_TILE,
    QUERY_TILE,
    SMALLEST_TILE,
    block_size,
    visited_pairs,
)
from thoughtbubbles.changes import preset_of
from thoughtbubbles.checks import check_fields
from thoughtbubbles.fields import LARGEST
from thoughtbubbles.policies import PrefixRank, TopK
from thoughtbubbles.policy import Policy, check_forced_keep
from thoughtbubbles.positions import RopeScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig(ArchitectureConfig):
    """Config of a `Thoughtbubbles` decoder, with or without fork layers (arXiv 2510.00219).

    Sizes: `vocab_size` V, `embed_dim` D, `num_heads` H, `num_kv_heads` G (default H), `head_dim` K
    (default D / H), `mlp_dim` F (default 4 D). `biases="all"` gives a bias to every linear layer of
    attention and MLP and to every LayerNorm, `"qkv"` only to the query, key and value projections.
    `rope_scaling` extends RoPE to longer contexts; the blocks in `nope_layers` (0-based) do not use
    RoPE. `context_length` is the longest sequence, in tokens, that pretrained parameters are meant
    for; longer sequences are not truncated.

    A fork layer precedes each block in `fork_layers` (0-based), and `policy` chooses which
    candidates become streams. `merge` combines a token's streams into one prediction:
    `"probability"` is the paper's mixture of predictions (eq. 11), `"residual"` the score-weighted
    sum of residuals of its authors' later code, and `"rightmost"` decodes the original alone.
    `score_bias="head"` adds the log-score to q·k before the division by sqrt(K) (the authors'
    code); `"none"` adds the log-score after the division, so that a key's unnormalised attention
    probability is multiplied by exactly p. With `score_originals=True`, as in the paper, originals
    have learned scores and are attenuated like forks; by default the score of an original stays 1.
    `copies` is the copy-k baseline: each input residual is repeated k times, and the rightmost copy
    is decoded. `fork_gate` gives each fork layer a learned scalar with this initial value. The
    scalar's magnitude times `forking.GATE_UNIT` multiplies the scores of forks; with a value near
    0, other streams at first hardly attend to forks (see `retrofit`).

    Each of the six switches from `fork_embedding` to `fractional_positions` removes one component
    of the architecture if it is False, for ablations.

    Attributes:
        vocab_size: Number of token ids in the vocabulary (V).
        embed_dim: Width of the residual stream (D).
        num_layers: Number of blocks.
        num_heads: Number of attention heads (H).
        num_kv_heads: Number of key/value heads (G), a divisor of `num_heads`; `num_heads` by
            default.
        head_dim: Width of an attention head (K), even; `embed_dim / num_heads` by default.
        mlp_dim: Hidden width of the MLP (F); four times `embed_dim` by default.
        norm: Kind of the normalisation layers.
        norm_eps: Term added to the variance in norms (ε).
        mlp: Kind of the MLP.
        qk_norm: Whether queries and keys are normalised in each head.
        tied_head: Whether the LM head shares the parameters of the embedding.
        rope_base: Base of the RoPE frequencies (θ).
        rope_scaling: RoPE scaling for longer contexts, as in a Hugging Face config.json; None
            for no scaling.
        nope_layers: Indices of blocks without RoPE, counted from 0.
        biases: Linear layers and norms that have a bias: "all", only the query, key and value
            projections ("qkv"), or "none".
        context_length: Longest sequence, in tokens, that pretrained parameters are meant for;
            longer sequences are not truncated.
        copies: Number of copies of each input residual (the copy-k baseline, without forks).
        fork_layers: Indices of blocks that a fork layer precedes, counted from 0.
        policy: Policy that chooses among the candidates of fork layers, e.g.
            "PrefixRank(ratio=1.5)".
        merge: Merge of a token's streams into one prediction: "probability" mixes their predictions
            (the paper's eq. 11), "residual" sums their residuals, weighted by scores (the authors'
            later code), "rightmost" takes the original alone.
        score_bias: Scaling of log-scores in attention logits: "head" divides log-scores by sqrt(K)
            like q·k (the authors' code), "none" adds log-scores undivided.
        score_originals: Whether originals have learned scores as forks do (the paper), or a fixed
            score of 1.
        fork_gate: Initial value of a learned factor on the scores of forks; None for no factor.
        fork_embedding: Whether a learned vector is added to forks.
        key_bias: Whether log-scores bias the attention to keys.
        value_scaling: Whether scores scale the values of attention.
        residual_scaling: Whether scores scale what a block writes to the residual stream.
        forced_keep: Whether originals are always kept (eq. 4).
        fractional_positions: Whether the streams of a token have fractional rotary positions.
        dtype: Dtype of the computation; parameters are float32 by default.
        scan_layers: Whether the blocks between fork layers run in a scan, which compiles faster.
        remat: Activations recomputed in the backward pass: "none", all but the results of linear
            layers and of attention that is large or by a kernel ("dots"), or all of them ("full").
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    mlp: Literal["gelu", "swiglu"] = "gelu"
    qk_norm: bool = False
    tied_head: bool = True
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    nope_layers: tuple[int, ...] = ()
    biases: Literal["all", "qkv", "none"] = "all"
    context_length: int | None = None

    copies: int = 1
    fork_layers: tuple[int, ...] = ()
    policy: Policy = PrefixRank()
    merge: Literal["probability", "residual", "rightmost"] = "residual"
    score_bias: Literal["head", "none"] = "head"
    score_originals: bool = False
    fork_gate: float | None = None
    fork_embedding: bool = True
    key_bias: bool = True
    value_scaling: bool = True
    residual_scaling: bool = True
    forced_keep: bool = True
    fractional_positions: bool = True

    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        check_fields(self)
        for field in dataclasses.fields(self):
            choices = getattr(field.type, "__args__", ())
            if getattr(field.type, "__origin__", None) is Literal:
                value = getattr(self, field.name)
                if value not in choices:
                    raise ValueError(f"{field.name}={value!r}: choose one of {', '.join(choices)}")
        for name in (
            "vocab_size",
            "embed_dim",
            "num_layers",
            "num_heads",
            "kv_heads",
            "head_width",
            "mlp_width",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
            if getattr(self, name) > LARGEST:
                raise ValueError(f"{name}={getattr(self, name)} is above {LARGEST}")
        for name in ("norm_eps", "rope_base"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: choose a positive number")
        if self.context_length is not None and self.context_length < 1:
            raise ValueError(f"context_length={self.context_length} is below 1")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            small = range(1, math.isqrt(self.embed_dim) + 1)
            pairs = ((n, self.embed_dim // n) for n in small if self.embed_dim % n == 0)
            divisors = {divisor for pair in pairs for divisor in pair}
            near = sorted(divisors, key=lambda n: abs(n - self.num_heads))[:2]
            raise ValueError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}: "
                f"choose a divisor such as {' or '.join(map(str, sorted(near)))}, or set head_dim"
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_dim={self.head_width} is odd: rotary positions need an even one"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}: "
                "choose a divisor"
            )
        for kind in ("fork", "nope"):
            layers = getattr(self, f"{kind}_layers")
            for layer in layers:
                if not 0 <= layer < self.num_layers:
                    raise ValueError(
                        f"{kind} layer {layer} is out of range for num_layers={self.num_layers}: "
                        f"choose from 0 to {self.num_layers - 1}"
                    )
            if list(layers) != sorted(set(layers)):
                raise ValueError(f"{kind}_layers={layers} must rise without repeats")
        check_forced_keep(self.policy, self.forced_keep, self.score_originals)
        if self.fork_gate is not None and not 0 < self.fork_gate < float("inf"):
            raise ValueError(f"fork_gate={self.fork_gate} is not positive: choose e.g. 1e-9")
        if self.copies < 1:
            raise ValueError(f"copies={self.copies} is below 1: 1 means no copies")
        if self.copies > 1 and (self.fork_layers or self.merge != "rightmost"):
            raise ValueError(
                f"copies={self.copies} is a baseline without forks that decodes the rightmost "
                f"copy: set fork_layers=() (now {self.fork_layers}) and merge='rightmost' "
                f"(now {self.merge!r})"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def rotary_layers(self) -> tuple[bool | None, ...]:
        """Whether each block uses RoPE; None for each block if all blocks use RoPE."""
        if not self.nope_layers:
            return (None,) * self.num_layers
        return tuple(layer not in self.nope_layers for layer in range(self.num_layers))

    @property
    def causal(self) -> bool:
        """Whether the logits at a position depend only on tokens up to it, by construction."""
        return not self.fork_layers or self.policy.causal

    def summary(self) -> str:
        """Describe the fork layers and their policy; "plain" without fork layers."""
        if not self.fork_layers:
            return "plain"
        return f"forks before layers {self.fork_layers}, {self.policy}"

    def sizes(self) -> str:
        """Describe depth, width, heads, vocabulary and dtype in one line."""
        return (
            f"{self.num_layers} layers of {self.embed_dim}, {self.num_heads} heads, vocabulary "
            f"{self.vocab_size:,}, {self.dtype}"
        )

    def unused_fields(self) -> tuple[str, ...]:
        """Names of the fields that have no effect in a model without fork layers."""
        return () if self.fork_layers else ("policy", "score_originals")

    def attention_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of query, key, value and bias (or None) of an attention call over 8 slots."""
        query = jax.ShapeDtypeStruct((1, 8, self.num_heads, self.head_width), self.dtype)
        key = jax.ShapeDtypeStruct((1, 8, self.kv_heads, self.head_width), self.dtype)
        biased = self.fork_layers and self.key_bias
        return query, key, key, jax.ShapeDtypeStruct((1, 8), "float32") if biased else None

    def groups(self) -> list[tuple[int, int]]:
        """Ranges `(start, end)` of block indices between fork layers; the first may be empty."""
        cuts = [0, *self.fork_layers, self.num_layers]
        return list(zip(cuts[:-1], cuts[1:], strict=True))

    def slots(self, num_tokens: int) -> list[int]:
        """Number of stream slots in each of the `num_layers` blocks, for a row of tokens."""
        count, per_layer = num_tokens * self.copies, []
        for index, (start, end) in enumerate(self.groups()):
            if index:
                count = min(2 * count, self.policy.capacity(num_tokens))
            per_layer += [count] * (end - start)
        return per_layer

    def prefill_bytes(self, num_tokens: int) -> int:
        """Estimate the bytes of a forward pass over one row without tiling of queries.

        Rows with a large estimate are prefilled in blocks of tokens (`thoughtbubbles.prefill`). The
        largest term is the attention logits of one block of queries, of which XLA holds 5 to 6
        copies at a time on a CPU.
        """
        slots = max(self.slots(num_tokens))
        logits = 4 * self.num_heads * min(block_size(slots), slots) * slots
        return 11 * logits // 2 + 4 * slots * (self.mlp_width + 4 * self.embed_dim)

    def pass_bytes(self, rows: int, num_tokens: int) -> int:
        """Estimate the bytes of a forward pass over rows, without parameters and cache.

        Unlike `prefill_bytes`, the estimate assumes that attention tiles the queries of large
        blocks.
        """
        slots = max(self.slots(num_tokens))
        of_query = 4 * rows * self.num_heads * slots
        logits = of_query * min(block_size(slots), slots)
        logits = min(logits, max(LARGEST_TILE, of_query * SMALLEST_TILE))
        return 5 * logits + 4 * rows * slots * (self.mlp_width + 4 * self.embed_dim)

    def extend_bytes(self, rows: int, num_tokens: int) -> int:
        """Estimate the bytes of extending a cache by tokens, without parameters and cache.

        The estimate does not depend on the number of tokens in the cache, because attention over a
        large cache is computed in tiles.

        Args:
            rows: Number of rows.
            num_tokens: Number of new tokens in each row.
        """
        slots = rows * num_tokens * self.copies * 2 ** len(self.fork_layers)
        tiles = rows * self.num_heads * QUERY_TILE * KEY_TILE
        return 4 * (2 * tiles + slots * (self.mlp_width + 4 * self.embed_dim))

    def num_params(self) -> int:
        """Number of parameters of the built model."""
        d, f, k = self.embed_dim, self.mlp_width, self.head_width
        norm = 2 * d if self.norm == "layernorm" and self.biases == "all" else d
        heads = self.num_heads + 2 * self.kv_heads
        maps = 3 if self.mlp == "swiglu" else 2
        block = 2 * norm + d * k * (heads + self.num_heads) + maps * d * f
        block += 2 * k * self.qk_norm
        block += heads * k * (self.biases != "none")
        block += (d + (maps - 1) * f + d) * (self.biases == "all")
        fork = norm + 2 * d + d * self.fork_embedding + (self.fork_gate is not None)
        table = self.vocab_size * d * (1 if self.tied_head else 2)
        return table + self.num_layers * block + len(self.fork_layers) * fork + norm

    def forward_flops(self, num_tokens: int) -> int:
        """Matrix-multiplication FLOPs of a forward pass over a row of tokens, logits included.

        A training step without rematerialisation costs three times as many FLOPs.
        """
        d, k, h = self.embed_dim, self.head_width, self.num_heads
        maps = 3 if self.mlp == "swiglu" else 2
        per_slot = d * k * (2 * h + 2 * self.kv_heads) + maps * d * self.mlp_width
        slots = self.slots(num_tokens)
        total = sum(2 * s * per_slot + 4 * visited_pairs(s) * h * k for s in slots)
        before_fork = [slots[layer - 1] if layer else num_tokens for layer in self.fork_layers]
        total += sum(4 * s * d for s in before_fork)
        decoded = num_tokens
        if slots[-1] != num_tokens or self.fork_layers:
            if self.merge == "probability":
                decoded = slots[-1]
            else:
                total += 2 * num_tokens * slots[-1] * d
        return total + 2 * decoded * d * self.vocab_size

    def recomputed_flops(self, num_tokens: int) -> int:
        """FLOPs that the backward pass of a row of tokens spends on recomputing forward results.

        `remat="dots"` recomputes no product but those of small attention without a kernel, which
        are not counted.
        """
        if self.remat != "full":
            return 0
        slots, wide = self.slots(num_tokens), self.num_heads * self.head_width
        mixing = sum(4 * visited_pairs(s) * wide for s in slots)
        one_layer = dataclasses.replace(
            self, fork_layers=(), nope_layers=(), copies=1, num_layers=1
        )
        projections = one_layer.forward_flops(1) - 2 * self.embed_dim * self.vocab_size - 4 * wide
        return mixing + projections * sum(slots)

    @classmethod
    def preset(cls, name: str, **changes: Unpack["ModelConfigChanges"]) -> "ModelConfig":
        """Return the preset of a given name with some fields changed.

        Args:
            name: Name in `PRESETS`: "tiny", or a size of arXiv 2510.00219.
            changes: New values of fields, as keyword arguments.

        Raises:
            ValueError: There is no preset of that name, or the fields do not fit together.
            TypeError: A name in `changes` is not a field.
        """
        return preset_of(PRESETS, name, changes)


class ModelConfigChanges(TypedDict, total=False):
    """The fields of `ModelConfig` as keyword arguments, so that type checkers find a typo."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None
    head_dim: int | None
    mlp_dim: int | None
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    mlp: Literal["gelu", "swiglu"]
    qk_norm: bool
    tied_head: bool
    rope_base: float
    rope_scaling: RopeScaling | None
    nope_layers: tuple[int, ...]
    biases: Literal["all", "qkv", "none"]
    context_length: int | None
    copies: int
    fork_layers: tuple[int, ...]
    policy: Policy
    merge: Literal["probability", "residual", "rightmost"]
    score_bias: Literal["head", "none"]
    score_originals: bool
    fork_gate: float | None
    fork_embedding: bool
    key_bias: bool
    value_scaling: bool
    residual_scaling: bool
    forced_keep: bool
    fractional_positions: bool
    dtype: Literal["float32", "bfloat16"]
    scan_layers: bool
    remat: Literal["none", "dots", "full"]


def _paper(embed_dim: int, num_layers: int, num_heads: int, fork_layers: tuple[int, ...]):
    return ModelConfig(
        vocab_size=50_304,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        fork_layers=fork_layers,
        policy=TopK(2.0),
        score_originals=True,
        merge="probability",
    )


# The paper gives 772.8M = 36 layers of 1280 and its authors' scripts 1.916B = 36 layers of 2048.
# For 150M and 319M the paper gives only the totals; these sizes come nearest (152M, 316M).
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=320, embed_dim=128, num_layers=4, num_heads=4, fork_layers=(1, 2, 3)
    ),
    "150m": _paper(768, 16, 12, (3, 7, 11)),
    "319m": _paper(1024, 21, 16, (3, 7, 11)),
    "772m": _paper(1280, 36, 20, (3, 7, 11)),
    "1_9b": dataclasses.replace(_paper(2048, 36, 16, (2, 5, 8)), merge="residual"),
}
