"""MemGenConfig: sizes and choices of weaver, trigger and insertion, with two presets."""

import dataclasses
from typing import Literal


def _at_least(config, **bounds: float) -> None:
    for name, bound in bounds.items():
        if getattr(config, name) < bound:
            raise ValueError(f"{name}={getattr(config, name)}: choose {bound} or more")


def _probability(config, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}={getattr(config, name)}: choose from 0 to 1")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685) of scale `alpha / rank`.

    Attributes:
        rank: Rank r of each adapter.
        alpha: Numerator of the adapters' scale, alpha / rank.
        dropout: Dropout rate on the adapters' input, in training only.
        targets: Names of the linear layers that get an adapter, as the backbone calls them
            (`DecoderBackbone.lora_targets`).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self):
        _at_least(self, rank=1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: choose from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class WeaverConfig:
    """What writes the latents.

    Attributes:
        prompt_latents: Latents written before the first new token (K_p).
        inference_latents: Latents written later, at boundaries (K_i).
        context: Vectors that the weaver reads: the "embeddings" that the reasoner reads (the
            authors' code), the reasoner's "hidden" states (the paper), or "nothing", the same
            latents whatever the text is (a control known as pause tokens).
        latents_see_latents: Whether the weaver's context holds earlier latents. Without them all
            events of a row are woven in one pass in training.
        match_scale: Whether each latent is normalised and multiplied by a learned gain that begins
            at the size of a token's embedding; otherwise latents start at whatever size comes out.
        lora: Adapter of the weaver on its backbone.
    """

    prompt_latents: int = 8
    inference_latents: int = 8
    context: Literal["embeddings", "hidden", "nothing"] = "embeddings"
    latents_see_latents: bool = True
    match_scale: bool = True
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self):
        _at_least(self, prompt_latents=0, inference_latents=0)
        if self.context not in ("embeddings", "hidden", "nothing"):
            raise ValueError(f"context={self.context!r}: choose embeddings, hidden or nothing")
        if self.context == "hidden" and not self.latents_see_latents:
            raise ValueError(
                "context='hidden' with latents_see_latents=False: hidden states after a latent "
                "have seen it; set one of them differently"
            )

    @property
    def latents(self) -> int:
        """`K`, slots of an event of either kind."""
        return max(self.prompt_latents, self.inference_latents)


@dataclasses.dataclass(frozen=True)
class TriggerConfig:
    """What decides when to weave.

    Attributes:
        source: Vectors that the trigger reads: "tokens" (it never sees a latent), the "stream" of
            embeddings with latents, or the "reasoner_hidden" state (no second pass, no adapter).
        init_invoke_prob: Probability of invoking before any training.
        lora: Adapter of the trigger on its backbone.
    """

    source: Literal["tokens", "stream", "reasoner_hidden"] = "tokens"
    init_invoke_prob: float = 0.5
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self):
        if self.source not in ("tokens", "stream", "reasoner_hidden"):
            raise ValueError(f"source={self.source!r}: choose tokens, stream or reasoner_hidden")
        if not 0 < self.init_invoke_prob < 1:
            raise ValueError(f"init_invoke_prob={self.init_invoke_prob}: choose between 0 and 1")


@dataclasses.dataclass(frozen=True)
class MemGenConfig:
    """A weaver, a trigger, and where memory may be inserted (arXiv 2509.24704).

    Attributes:
        weaver: What writes the latents.
        trigger: What decides when to weave; None for a model whose trigger is a rule
            (`memgen.AlwaysInvoke` and others).
        max_inference_events: Events of a response at most (N), without the one before its first
            token.
        insertion: Boundaries of a training text that get latents: the "first" N, or each with
            probability `insertion_prob` up to N ("random").
        insertion_prob: Probability of an event at a boundary of a training text, with "random".
    """

    weaver: WeaverConfig = WeaverConfig()
    trigger: TriggerConfig | None = None
    max_inference_events: int = 5
    insertion: Literal["first", "random"] = "first"
    insertion_prob: float = 0.5

    def __post_init__(self):
        _at_least(self, max_inference_events=0)
        _probability(self, "insertion_prob")
        if self.insertion not in ("first", "random"):
            raise ValueError(f"insertion={self.insertion!r}: choose first or random")

    @classmethod
    def reference(cls) -> "MemGenConfig":
        """What the authors' code does: weaver on embeddings, trigger on token ids."""
        lora = LoRAConfig(dropout=0.1)
        weaver = WeaverConfig(match_scale=False, lora=lora)
        return cls(weaver, TriggerConfig("tokens", lora=lora))

    @classmethod
    def paper(cls) -> "MemGenConfig":
        """What the paper says: both read hidden states, latents at random boundaries."""
        lora = LoRAConfig(dropout=0.1)
        weaver = WeaverConfig(context="hidden", match_scale=False, lora=lora)
        trigger = TriggerConfig("reasoner_hidden", lora=lora)
        return cls(weaver, trigger, insertion="random")

    @property
    def events(self) -> int:
        """`E`, the largest number of events of a response."""
        return 1 + self.max_inference_events

    @property
    def max_latents(self) -> int:
        """The largest number of latents of a response."""
        return (
            self.weaver.prompt_latents + self.max_inference_events * self.weaver.inference_latents
        )
