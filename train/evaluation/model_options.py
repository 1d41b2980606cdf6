"""Options of commands that change a model: an adapter, int8, overrides of its fork policy."""

import dataclasses
from typing import TypeVar

from thoughtbubbles import Policy
from train.cli.numbers import check_least
from train.evaluation.policy_overrides import override_policy
from train.models.load import LanguageModel

Loaded = TypeVar("Loaded", bound=LanguageModel)


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """Options that name a model, and an adapter for it.

    Attributes:
        checkpoint: Run folder, or one of its step folders.
        model: Pretrained model in place of a checkpoint: "smollm2", a Hugging Face folder, or a
            .gguf file.
        adapter: Folder of a LoRA adapter in `peft` format, which is merged into the model; none by
            default.
    """

    checkpoint: str | None = None
    model: str | None = None
    adapter: str | None = None

    def changed(self, loaded: Loaded) -> Loaded:
        """Return the model with the adapter merged into it."""
        return loaded if self.adapter is None else loaded.with_adapter(self.adapter)


@dataclasses.dataclass(frozen=True)
class ModelOptions(NamedModel):
    """Options of the commands that run a model as it is or changed.

    Attributes:
        int8: Whether to quantise the model to int8, except norms, biases and fork layers.
        policy: Fork policy that replaces the model's own, e.g. "PrefixRank(ratio=2.0)".
        ratio: Ratio of streams per token that replaces the policy's ratio.
        window: Number of tokens that `PrefixRank` ranks together, which replaces the policy's
            window.
        threshold_offset: Offset added to the threshold of a `Threshold` policy; a positive offset
            gives fewer streams.
    """

    int8: bool = False
    policy: Policy | None = None
    ratio: float | None = None
    window: int | None = None
    threshold_offset: float | None = None

    def __post_init__(self):
        check_least(self, ratio=1, window=1, threshold_offset=-1)

    def changed(self, loaded: Loaded) -> Loaded:
        """Return the model with the adapter merged into it, quantised if `int8` is True."""
        loaded = super().changed(loaded)
        return loaded.in_int8() if self.int8 else loaded

    @property
    def overrides(self) -> bool:
        """Whether an option changes the model's fork policy."""
        options = (self.policy, self.ratio, self.window, self.threshold_offset)
        return any(option is not None for option in options)

    def overridden(self, own: Policy | None) -> Policy:
        """Return the fork policy of the model with the overrides.

        Args:
            own: Policy of the model; None for a plain decoder.

        Raises:
            ValueError: The model is a plain decoder, the policy lacks an option that is overridden,
                or a value is out of range.
        """
        if own is None:
            name = self.checkpoint or self.model
            raise ValueError(f"{name} is a plain decoder: it has no policy to change")
        policy = self.policy or own
        return override_policy(policy, self.ratio, self.window, self.threshold_offset)
