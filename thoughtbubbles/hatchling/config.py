"""HatchlingConfig: sizes and options of a Dragon Hatchling, presets, and FLOP counts."""

import dataclasses
import math
from typing import ClassVar, Literal, TypedDict, Unpack

from thoughtbubbles.architecture import ArchitectureConfig
from thoughtbubbles.changes import preset_of
from thoughtbubbles.checks import check_fields


@dataclasses.dataclass(frozen=True)
class HatchlingConfig(ArchitectureConfig):
    """Sizes and options of a Dragon Hatchling (BDH, arXiv 2509.26507).

    All L layers share one set of parameters, the linear layers Dx, Dy and E.

    Attributes:
        vocab_size: Number of token ids of the embedding (V).
        embed_dim: Width of the residual vectors, from which neurons are computed and to which they
            are mapped back; the connections between neurons thus have at most this rank (d).
        num_neurons: Number of neurons (n), a multiple of twice `num_heads`.
        num_layers: Number of times the shared layer is applied (L).
        num_heads: Number of heads that split the neurons (H).
        form: Variant of the model: "released" is the authors' code, with which the published curves
            were made, and has a residual stream of width d; "paper" is eq. 8 of the paper, and has
            a residual stream of n neurons.
        damping: Whether attention decays with distance, at a different rate in each head, as in
            ALiBi. The released code has no damping.
        rope_base: Base of the rotary frequencies (θ).
        dropout: Probability with which a gated neuron (y) is dropped in pretraining; fine-tuning
            and RL use no dropout.
        chunk: Number of tokens whose attention scores are computed at once. Longer rows are
            processed chunk by chunk with the same result, as the state passes from chunk to chunk.
            None processes whole rows at once.
        separator: Token id that begins a document. It empties the state and restarts positions at
            0, so that documents packed in a row are independent. None for rows of one text each.
        truncate: Number of tokens per segment of truncated backpropagation. The pretraining loss
            processes longer rows segment by segment, without gradients through the state between
            segments, so that activations of only one segment are stored. None backpropagates
            through whole rows.
        context_length: Number of tokens per row in training, if known.
        dtype: Dtype of the computation; parameters, phases and states are float32.
        remat: Activations that the backward pass recomputes: "full" for all activations within a
            layer, or "none". In the paper's form, the neurons between layers are always stored.
    """

    vocab_size: int = 320
    embed_dim: int = 256
    num_neurons: int = 32_768
    num_layers: int = 6
    num_heads: int = 4
    form: Literal["released", "paper"] = "released"
    damping: bool = False
    rope_base: float = 65_536.0
    dropout: float = 0.0
    chunk: int | None = None
    separator: int | None = None
    truncate: int | None = None
    context_length: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "full"

    execution_fields: ClassVar[tuple[str, ...]] = ("remat", "chunk")

    def __post_init__(self):
        check_fields(self)
        for name in ("vocab_size", "embed_dim", "num_neurons", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if self.num_neurons % (2 * self.num_heads):
            step = 2 * self.num_heads
            raise ValueError(
                f"num_neurons={self.num_neurons} does not divide into num_heads={self.num_heads} "
                f"heads of neuron pairs: choose a multiple of {step}, such as "
                f"{max(round(self.num_neurons / step), 1) * step}"
            )
        for name, choices in (
            ("form", ("released", "paper")),
            ("dtype", ("float32", "bfloat16")),
            ("remat", ("none", "full")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(choices)}")
        if not 0 < self.rope_base < math.inf:
            raise ValueError(f"rope_base={self.rope_base}: choose a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: choose 0 or more, below 1")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} is below 1: leave it out to read rows whole")
        if self.truncate is not None and self.truncate < 1:
            raise ValueError(
                f"truncate={self.truncate} is below 1: leave it out for the gradient of whole rows"
            )
        if self.separator is not None and not 0 <= self.separator < self.vocab_size:
            raise ValueError(
                f"separator={self.separator} is no token id of vocab_size={self.vocab_size}: "
                f"choose 0 to {self.vocab_size - 1}, or leave it out"
            )

    @property
    def head_neurons(self) -> int:
        """Number of neurons in a head (N = n / H)."""
        return self.num_neurons // self.num_heads

    def prefill_bytes(self, num_tokens: int) -> int:
        """Estimate the bytes of a forward pass over one row, without parameters and cache.

        The estimate counts the attention scores of one head, because XLA on a CPU holds the scores
        of one head at a time.
        """
        chunk = min(self.chunk or num_tokens, num_tokens)
        return 4 * (chunk**2 + 6 * chunk * self.num_neurons + 8 * num_tokens * self.embed_dim)

    def extend_bytes(self, rows: int, num_tokens: int) -> int:
        """Estimate the bytes of prefilling `num_tokens` more tokens in each of `rows` rows."""
        return rows * self.prefill_bytes(num_tokens)

    def num_params(self) -> int:
        """Number of parameters: 3nd + 2Vd."""
        return self.embed_dim * (3 * self.num_neurons + 2 * self.vocab_size)

    def forward_flops(self, num_tokens: int) -> int:
        """Matrix-multiplication FLOPs of a forward pass over `num_tokens`, logits included.

        FLOPs of attention are those of rows processed in parts of `chunk` or `truncate` tokens,
        whichever is smaller.
        """
        d, n, h = self.embed_dim, self.num_neurons, self.num_heads
        chunk = min(self.chunk or num_tokens, self.truncate or num_tokens, num_tokens)
        full, rest = divmod(num_tokens, chunk)
        scores = (full * chunk**2 + rest**2) * (n + h * d)
        state = 0 if chunk == num_tokens else 2 * num_tokens * n * d
        layer = 3 * num_tokens * n * d + scores + state
        return 2 * (self.num_layers * layer + num_tokens * d * self.vocab_size)

    def recomputed_flops(self, num_tokens: int) -> int:
        """FLOPs that the backward pass of one row spends on recomputing the layers."""
        if self.remat == "none":
            return 0
        return self.forward_flops(num_tokens) - 2 * num_tokens * self.embed_dim * self.vocab_size

    def summary(self) -> str:
        """Return a short description: the form and the number of neurons."""
        return f"hatchling ({self.form}) of {self.num_neurons:,} neurons"

    def sizes(self) -> str:
        """Return a one-line description of layers, widths, vocabulary and dtype."""
        return (
            f"{self.num_layers} layers that share weights, {self.num_neurons:,} neurons in "
            f"{self.num_heads} heads, width {self.embed_dim}, vocabulary {self.vocab_size:,}, "
            f"{self.dtype}"
        )

    @classmethod
    def preset(cls, name: str, **changes: Unpack["HatchlingConfigChanges"]) -> "HatchlingConfig":
        """Make the config of a preset, a named size in `PRESETS`, with changes.

        Args:
            name: Name of the preset.
            changes: Values of fields that differ from the preset's.

        Raises:
            ValueError: There is no preset of that name, or the fields do not fit together.
            TypeError: A change names no field.
        """
        return preset_of(PRESETS, name, changes)


class HatchlingConfigChanges(TypedDict, total=False):
    """Keyword arguments of `HatchlingConfig.preset`, so that type checkers find wrong names."""

    vocab_size: int
    embed_dim: int
    num_neurons: int
    num_layers: int
    num_heads: int
    form: Literal["released", "paper"]
    damping: bool
    rope_base: float
    dropout: float
    chunk: int | None
    separator: int | None
    truncate: int | None
    context_length: int | None
    dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "full"]


# The authors' default is 25m. The authors scale only n; the number of parameters is 3nd + 2Vd.
PRESETS: dict[str, HatchlingConfig] = {
    "tiny": HatchlingConfig(embed_dim=64, num_neurons=2048, num_layers=4),
    "10m": HatchlingConfig(vocab_size=256, num_neurons=12_288),
    "25m": HatchlingConfig(vocab_size=256, dropout=0.1),
    "50m": HatchlingConfig(vocab_size=256, num_neurons=65_536),
    "100m": HatchlingConfig(vocab_size=256, num_neurons=131_072),
    "400m": HatchlingConfig(vocab_size=256, num_neurons=524_288),
    "1b": HatchlingConfig(vocab_size=256, num_neurons=1_310_720),
}
