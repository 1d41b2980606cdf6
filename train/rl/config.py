"""RLConfig: everything that defines a run of reinforcement learning, and methods by name."""

import dataclasses
import math
from typing import Literal

from memgen import LoRAConfig, MemGenConfig, TriggerConfig, WeaverConfig
from train.engine.config import LoopConfig
from train.engine.optim import OptimizerConfig
from train.models import finetunable
from train.rl.learning.penalties import InvocationPenalty
from train.rl.methods import Method, method_from_text
from train.runs.resume import FREE


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(LoopConfig):
    """Reinforcement learning with verifiable rewards.

    A step draws `batch_size` problems, `rollouts` for each, and makes `minibatches` optimizer
    steps on them, each in `accumulate` parts.

    Attributes:
        weights: what to start from: a run folder, "smollm2", a Hugging Face folder, a .gguf file.
        train: `all` parameters, a `lora` adapter, a `weaver` of latent memory, or the `trigger` of
            weights that have a weaver; in the last three the rest is frozen.
        task: e.g. "arithmetic", "reverse(length=4)", "gsm8k:problems.jsonl"; "help" lists all.
        method: Method of reinforcement learning, one of grpo, dr_grpo, rloo, dapo, reinforce_pp,
            rebn and trigger (`train.rl.methods`), with options where they are to differ from the
            method's own: "grpo(kl=0.01, clip_high=0.28)". The default is trigger where a trigger
            is trained, else grpo.
        steps: each draws problems, samples rollouts and learns from them.
        seed: of new parameters, problems and rollouts.
        batch_size: problems of a step.
        rollouts: of each problem.
        minibatches: optimizer steps on the rollouts of a step.
        epochs: times that all of them are gone through.
        max_new_tokens: of a response.
        temperature: of sampling.
        chat: problems are messages to the model, in its chat template.
        max_batches: with `filter_groups`, batches of problems that a step draws at most.
        overlong_buffer: a response pays for the tokens that reach into the last so many before
            `max_new_tokens`, up to `overlong_penalty` (DAPO).
        max_turns: after which an episode of an environment is cut.
        max_observation: tokens of an observation that are read.
        carry: go on in one row from turn to turn, with the latents so far; else each turn begins
            anew with the text so far. None: unless there is latent memory, or `chat`.
        penalty: on invocations of the trigger.
        lora: of `lora`. Dropout of adapters is never applied here: what was sampled is replayed.
        memgen: of `weaver`, where the weights have none; `trigger` of `trigger`.
        boundaries: after which tokens memory may be written.
        max_rows: rollouts that are generated at a time.
        examples: texts that are printed at each evaluation.
    """

    weights: str = "smollm2"
    train: finetunable.Method = "lora"
    task: str = "arithmetic"
    method: Method | str | None = None
    batch_size: int = 16
    rollouts: int = 8
    minibatches: int = 1
    epochs: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    chat: bool = False
    max_batches: int = 10
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    max_turns: int = 8
    max_observation: int = 64
    carry: bool | None = None
    penalty: InvocationPenalty = InvocationPenalty()
    lora: LoRAConfig = LoRAConfig()
    memgen: MemGenConfig = MemGenConfig(WeaverConfig())
    trigger: TriggerConfig = TriggerConfig()
    boundaries: Literal["suffix", "exact_id", "sentence"] = "suffix"
    max_rows: int = dataclasses.field(default=256, metadata=FREE)
    examples: int = dataclasses.field(default=2, metadata=FREE)
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, weight_decay=0.0, final_ratio=1.0
    )
    out: str = dataclasses.field(default="runs/rl", metadata=FREE)

    def __post_init__(self):
        super().__post_init__()
        method = self.method
        if method is None:  # so that a run folder says what it was, by whatever default
            method = "trigger" if self.train == "trigger" else "grpo"
        if isinstance(method, str):
            object.__setattr__(self, "method", method_from_text(method))
        least = {"minibatches": 1, "epochs": 1, "max_batches": 1, "max_turns": 1, "max_rows": 1,
                 "max_observation": 1, "max_new_tokens": 1, "rollouts": 1, "examples": 0,
                 "overlong_buffer": 0}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)}: choose {bound} or more")
        method = self.recipe
        if self.rollouts < 2 and method.compares:
            raise ValueError(
                f"rollouts={self.rollouts}: {method.word} compares rollouts of one problem: "
                "choose 2 or more"
            )
        greedy = self.temperature == 0 and self.train == "trigger"
        if not (greedy or 0 < self.temperature < math.inf):
            raise ValueError(
                f"temperature={self.temperature}: choose a number above 0 (at 0 all rollouts of a "
                "problem would be equal, unless a trigger is sampled)"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is more than max_new_tokens="
                f"{self.max_new_tokens}: choose less"
            )
        if method.by_turn and (self.penalty.weight or self.overlong_buffer):
            raise ValueError(
                f"{method.word} goes by the rewards of turns, which know no penalty.weight and no "
                "overlong_buffer: leave them out, or choose another method"
            )
        if method.importance_cap is not None and self.train == "trigger":
            raise ValueError(
                "importance_cap is of tokens, train='trigger' learns decisions: leave it out"
            )
        if method.filter_groups and self.rollouts < 2:
            raise ValueError(
                f"filter_groups keeps no group of rollouts={self.rollouts}: choose 2 or more"
            )
        if self.overlong_penalty < 0:
            raise ValueError(f"overlong_penalty={self.overlong_penalty}: choose 0 or more")
        if self.penalty.weight and self.train != "trigger":
            raise ValueError(
                f"penalty.weight={self.penalty.weight} is of a trigger, train={self.train!r} "
                "trains none: leave it out"
            )

    @property
    def recipe(self) -> Method:
        """The method with its options."""
        assert isinstance(self.method, Method)
        return self.method

    @property
    def carries(self) -> bool:
        """`carry`, or what None stands for."""
        if self.carry is None:
            return self.train in ("all", "lora") and not self.chat
        return self.carry

    @property
    def updates(self) -> int:
        """Optimizer steps of a step."""
        return self.minibatches * self.epochs
