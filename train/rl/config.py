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

    A step draws `batch_size` problems, samples `num_generations` responses to each, and makes
    `minibatches` optimizer steps on them, each in `accumulate` parts.

    Attributes:
        weights: Model to start from: a run folder, "smollm2", a Hugging Face folder, or a .gguf
            file.
        train: Parameters that are trained: "all", a "lora" adapter, a "weaver" of latent memory, or
            the "trigger" of weights that have a weaver; in the last three the rest is frozen.
        task: Task with its options, e.g. "arithmetic", "reverse(length=4)", "gsm8k:problems.jsonl";
            "help" lists all.
        method: Method of reinforcement learning, one of grpo, dr_grpo, rloo, dapo, reinforce_pp,
            rebn and trigger (`train.rl.methods`), with options where they are to differ from the
            method's own: "grpo(kl=0.01, clip_high=0.28)". The default is trigger where a trigger is
            trained, else grpo.
        steps: Number of steps, each of which draws problems, samples rollouts and learns from them.
        seed: Seed of new parameters, problems and rollouts.
        batch_size: Problems of a step.
        num_generations: Rollouts of each problem (G of GRPO).
        minibatches: Parts of the rollouts of a step, one optimizer step each, in every pass.
        epochs: Number of passes over the rollouts of a step (μ of GRPO).
        max_new_tokens: Longest response, in tokens.
        temperature: Sampling temperature of rollouts.
        chat: Whether problems are messages to the model, in its chat template.
        max_batches: Batches of problems that a step draws at most, where the method filters groups.
        overlong_buffer: Last tokens before `max_new_tokens` over which the overlong penalty of DAPO
            grows; 0 for no penalty.
        overlong_penalty: Overlong penalty of a response that reaches `max_new_tokens`.
        max_turns: Turns after which an episode of an environment is cut.
        max_observation: Tokens of an observation that are read at most.
        keep_context: Whether turns go on in one row, with the latents so far, or each turn begins
            anew with the text so far. The default keeps it where there is neither latent memory
            nor a chat template.
        penalty: Price of invocations of the trigger.
        lora: Adapter of `lora`. Its dropout is never applied: what was sampled is replayed.
        memgen: Weaver of `weaver`, where the weights have none.
        trigger: Trigger of `trigger`.
        boundaries: Tokens after which memory may be written (`memgen.boundary_table`).
        max_rows: Rollouts that are generated at a time.
        examples: Texts that are printed at each evaluation.
    """

    weights: str = "smollm2"
    train: finetunable.Method = "lora"
    task: str = "arithmetic"
    method: Method | str | None = None
    batch_size: int = 16
    num_generations: int = 8
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
    keep_context: bool | None = None
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
                 "max_observation": 1, "max_new_tokens": 1, "num_generations": 1, "examples": 0,
                 "overlong_buffer": 0}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)}: choose {bound} or more")
        method = self.recipe
        if self.num_generations < 2 and method.compares:
            raise ValueError(
                f"num_generations={self.num_generations}: {method.word} compares rollouts of one "
                "problem: "
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
        if method.filter_groups and self.num_generations < 2:
            raise ValueError(
                f"filter_groups keeps no group of num_generations={self.num_generations}: choose 2 "
                "or more"
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
        """`keep_context`, or what None stands for."""
        if self.keep_context is None:
            return self.train in ("all", "lora") and not self.chat
        return self.keep_context

    @property
    def updates(self) -> int:
        """Optimizer steps of a step."""
        return self.minibatches * self.epochs
