"""RunConfig: the options of a pretraining run."""

import dataclasses
from typing import Literal

from thoughtbubbles import ArchitectureConfig, Policy, PrefixRank
from train.data import DataConfig
from train.engine.config import LoopConfig
from train.runs.resume import FREE, free_inside


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Pretrained weights that a run starts from.

    The weights determine the model and the tokenizer. The run's `model` then sets only `dtype`,
    `scan_layers` and `remat`, which say how to compute.

    Attributes:
        weights: Pretrained weights: "smollm2", a Hugging Face folder, or a .gguf file; "" for
            random initial parameters.
        forks: Indices of the blocks, from 0, before which new fork layers are added to the
            pretrained model (`thoughtbubbles.retrofit`).
        policy: Fork policy of the new fork layers.
    """

    weights: str = ""
    forks: tuple[int, ...] = ()
    policy: Policy = PrefixRank()

    def __post_init__(self):
        if self.forks and not self.weights:
            raise ValueError(
                f"init.forks={self.forks} go into pretrained weights: add --init.weights, or "
                "choose model.fork_layers"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(LoopConfig):
    """A pretraining run.

    Attributes:
        model: Sizes and options of the model; `--architecture` chooses its architecture.
        init: Pretrained weights that the run starts from.
        train: Parameters that are trained: "all", or only those of fork layers ("forks").
        data: Corpus, tokenizer and row length.
        prompt: Prompt of the text that is sampled at the end of the run.
    """

    model: ArchitectureConfig
    init: InitConfig = InitConfig()
    train: Literal["all", "forks"] = "all"
    data: DataConfig = dataclasses.field(default=DataConfig(), metadata=free_inside("cache_dir"))
    prompt: str = dataclasses.field(default="def ", metadata=FREE)

    @property
    def step_flops(self) -> int:
        """Number of model FLOPs of a step: three times the matrix products of a forward pass."""
        return 3 * self.batch_size * self.model.forward_flops(self.data.seq_len)
