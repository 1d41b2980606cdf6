"""MemGenConfig: sizes and options of the weaver, the trigger and the events; two presets."""

import dataclasses
import math
from typing import Literal

from memgen.checks import check_config, check_number, is_whole


def _at_least(config, **bounds: float) -> None:
    for name, bound in bounds.items():
        if not is_whole(getattr(config, name)):
            raise ValueError(f"{name}={getattr(config, name)!r}: choose a whole number")
        if getattr(config, name) < bound:
            raise ValueError(f"{name}={getattr(config, name)}: choose {bound} or more")


def _probability(config, *names: str) -> None:
    for name in names:
        check_number(name, getattr(config, name))
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}={getattr(config, name)}: choose from 0 to 1")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Sizes and options of low-rank adapters (LoRA, arXiv 2106.09685).

    Attributes:
        rank: Rank r of each adapter.
        alpha: Numerator of the adapters' scale, alpha / rank.
        dropout: Dropout rate on the adapters' input, in training only.
        targets: Linear layers that get an adapter. A target is a path in
            `DecoderBackbone.lora_targets`, the last component of paths ("q" selects every layer
            such as "layers/0/attn/q" or "layers/0/attn/q_proj"), or a pattern with wildcards
            ("layers/1?/*", "*_proj").
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self):
        _at_least(self, rank=1)
        if not isinstance(self.targets, tuple):
            raise ValueError(f"targets={self.targets!r}: give a tuple, such as ('q', 'v')")
        check_number("dropout", self.dropout)
        check_number("alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: choose from 0 to below 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: choose a positive number")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets={self.targets} names a layer twice: name each once")


@dataclasses.dataclass(frozen=True)
class WeaverConfig:
    """Sizes and options of the weaver, which writes the latents.

    Attributes:
        prompt_latents: Number of latents of the event before the first new token (K_p).
        inference_latents: Number of latents of each later event, at a boundary (K_i).
        context: Input of the weaver: the reasoner's input "embeddings" (the authors' code), the
            reasoner's "hidden" states (the paper), or "nothing", which gives the same latents for
            every text (a control known as pause tokens).
        latents_see_latents: Whether the weaver's context includes earlier latents. If False,
            training weaves all events of a row in one forward pass.
        match_scale: Whether each latent is normalised and multiplied by a learned gain, whose
            initial value is the root mean square of the reasoner's token embeddings.
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
        check_config(self.lora, LoRAConfig)
        if self.context not in ("embeddings", "hidden", "nothing"):
            raise ValueError(f"context={self.context!r}: choose embeddings, hidden or nothing")
        if self.context == "hidden" and not self.latents_see_latents:
            raise ValueError(
                "context='hidden' with latents_see_latents=False: hidden states after a latent "
                "have seen it; set one of them differently"
            )

    @property
    def latents(self) -> int:
        """Number `K` of latent slots of an event, the maximum over both kinds of events."""
        return max(self.prompt_latents, self.inference_latents)


@dataclasses.dataclass(frozen=True)
class TriggerConfig:
    """Sizes and options of the trigger, which decides when to weave.

    Attributes:
        source: Input of the trigger: "tokens" (embedded tokens without latents), "stream" (the
            reasoner's input, which is embedded tokens and latents), or "reasoner_hidden" (the
            reasoner's hidden state, which needs no second forward pass and no adapter).
        init_invoke_prob: Probability of invoking the weaver before any training.
        lora: Adapter of the trigger on its backbone. Its dropout has no effect: the trigger is
            trained by reward, which scores decisions as they were sampled, without dropout.
    """

    source: Literal["tokens", "stream", "reasoner_hidden"] = "tokens"
    init_invoke_prob: float = 0.5
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self):
        if self.source not in ("tokens", "stream", "reasoner_hidden"):
            raise ValueError(f"source={self.source!r}: choose tokens, stream or reasoner_hidden")
        check_number("init_invoke_prob", self.init_invoke_prob)
        check_config(self.lora, LoRAConfig)
        if not 0 < self.init_invoke_prob < 1:
            raise ValueError(f"init_invoke_prob={self.init_invoke_prob}: choose between 0 and 1")


@dataclasses.dataclass(frozen=True)
class MemGenConfig:
    """Sizes and options of a MemGen: its weaver, its trigger, and its events (arXiv 2509.24704).

    An event inserts latents either before the first token of a response, or at a boundary in it.

    Attributes:
        weaver: Sizes and options of the weaver.
        trigger: Sizes and options of the trigger; None for a model without a learned trigger, which
            needs a fixed policy such as `memgen.AlwaysInvoke`.
        max_inference_events: Maximum number of events per response (N), not counting the event
            before its first token.
        insertion: Rule that selects the boundaries of a training text that get latents: the "first"
            N boundaries, or a "random" selection of up to N boundaries.
        insertion_prob: Probability with which each boundary of a training text is selected if
            `insertion` is "random".
    """

    weaver: WeaverConfig = WeaverConfig()
    trigger: TriggerConfig | None = None
    max_inference_events: int = 5
    insertion: Literal["first", "random"] = "first"
    insertion_prob: float = 0.5

    def __post_init__(self):
        _at_least(self, max_inference_events=0)
        check_config(self.weaver, WeaverConfig)
        if self.trigger is not None:
            check_config(self.trigger, TriggerConfig)
        _probability(self, "insertion_prob")
        if self.insertion not in ("first", "random"):
            raise ValueError(f"insertion={self.insertion!r}: choose first or random")

    @classmethod
    def reference(cls) -> "MemGenConfig":
        """Return the config of the authors' code: weaver on embeddings, trigger on token ids."""
        lora = LoRAConfig(dropout=0.1)
        weaver = WeaverConfig(match_scale=False, lora=lora)
        return cls(weaver, TriggerConfig("tokens", lora=lora))

    @classmethod
    def paper(cls) -> "MemGenConfig":
        """Return the paper's config: weaver and trigger on hidden states, random boundaries."""
        lora = LoRAConfig(dropout=0.1)
        weaver = WeaverConfig(context="hidden", match_scale=False, lora=lora)
        trigger = TriggerConfig("reasoner_hidden", lora=lora)
        return cls(weaver, trigger, insertion="random")

    @property
    def events(self) -> int:
        """Maximum number `E` of events of a response, with the event before its first token."""
        return 1 + self.max_inference_events

    @property
    def max_latents(self) -> int:
        """Maximum number of latents per response, over all its events."""
        return (
            self.weaver.prompt_latents + self.max_inference_events * self.weaver.inference_latents
        )
