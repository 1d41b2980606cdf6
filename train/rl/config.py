"""RLConfig: the options that define a run of reinforcement learning."""

import dataclasses
import math
from typing import Any, Literal

from memgen import LoRAConfig, MemGenConfig, TriggerConfig, WeaverConfig
from train.cli.calls import text_of
from train.engine.config import LoopConfig
from train.engine.optim import OptimizerConfig
from train.models import finetunable
from train.rl.learning.estimators import Advantage
from train.rl.learning.losses import PolicyLoss
from train.rl.learning.penalties import RewardShaping
from train.rl.methods import Method, Parts
from train.rl.parts import KINDS, checked, part_from_text
from train.rl.rollout.budgets import BudgetAllocator
from train.rl.rollout.strategies import RolloutStrategy
from train.runs.resume import FREE, NOTED

_NUM_GENERATIONS = 8
_COLDEST = 1e-6  # temperature; gradients, which it divides, overflow far below
_MOST_ROLLOUTS = 2**22  # maximum of a step, whose texts are in host RAM


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(LoopConfig):
    """Reinforcement learning with verifiable rewards.

    A step draws `batch_size` problems, samples `num_generations` responses to each problem, and
    makes `epochs` passes over the responses. A pass has `minibatches` optimizer steps, each of
    `accumulate` micro-batches.

    Attributes:
        weights: Model to start from: a run folder, "smollm2", a Hugging Face folder, or a .gguf
            file.
        train: Parameters that are trained: "all", a "lora" adapter, a "weaver" of latent memory, or
            the "trigger" of weights that have a weaver. All other parameters are frozen.
        task: Task or environment with its options, e.g. "arithmetic", "reverse(length=4)",
            "gsm8k:problems.jsonl"; "help" lists all.
        method: Method of reinforcement learning with its options, e.g. "dapo" or
            "grpo(kl=0.01, clip_high=0.28)". The default is "trigger" for `train="trigger"`, else
            "grpo". A method is a preset of the parts that the next five options may replace.
        allocator: Budget allocator, which decides how many rollouts each problem of a step gets,
            e.g. "uniform". The default is the method's.
        strategy: Rollout strategy, e.g. "turns(max_turns=4)". The default is the method's. If the
            method has none, a task gets one response and an environment is played in turns.
        reward: Reward shapings, applied in order, e.g. "overlong(buffer=64)". The default is the
            method's. Penalties never change whether a rollout counts as a success.
        advantage: Advantage estimator, e.g. "rloo" or "rebn(gamma=0.9)". The default is the
            method's.
        loss: Policy loss, e.g. "clipped(aggregate='token', kl=0.01)". The default is the method's
            loss with the method's options.
        steps: Number of steps, each of which draws problems, samples rollouts and learns from them.
        seed: Seed of new parameters, of the order of problems, and of the rollouts.
        batch_size: Number of problems per step.
        pool: Number of training problems: every epoch goes through the first `pool` problems of the
            task. None uses all problems; an endless task hardly ever repeats a problem.
        num_generations: Number of rollouts of each problem (G of GRPO), an average if the allocator
            is not uniform. The default is the method's, or 8 if the method sets none.
        minibatches: Number of minibatches that each pass splits the rollouts of a step into; each
            minibatch is one optimizer step.
        epochs: Number of passes over the rollouts per step (μ of GRPO).
        max_new_tokens: Maximum number of tokens per response.
        temperature: Sampling temperature of rollouts.
        chat: Whether prompts are rendered as messages in the model's chat template.
        max_batches: Maximum number of batches of problems that a step draws if the method filters
            groups (dynamic sampling).
        lora: Config of the adapter for `train="lora"`. Dropout of the adapter is never applied, so
            that updates score tokens with the policy that sampled them.
        memgen: Config of latent memory for `train="weaver"`, used if the weights have no weaver.
        trigger: Config of the trigger for `train="trigger"`, used if the weights have no trigger.
        boundaries: Rule that decides after which tokens memory may be written: "suffix", "exact_id"
            or "sentence" (see `memgen.boundary_table`), used if the weights have no weaver.
        environment_limit_s: Time limit for a reset or a step of an environment, in seconds. An
            episode that exceeds the limit is a failure, counted as `info/timeouts`; eight such
            episodes in a row end the run. None sets no limit, and calls the environment on the main
            thread, which graders that use signals need.
        max_rows: Maximum number of rollouts that are generated at a time.
        share_prompts: Whether an update computes the prompt of a problem once for all of its
            rollouts, if that saves enough work and the policy supports it. Results are equal up to
            rounding.
        examples: Number of rollouts whose texts are printed at each evaluation.
    """

    weights: str = "smollm2"
    train: finetunable.Method = "lora"
    task: str = "arithmetic"
    method: Method | str | None = None
    allocator: BudgetAllocator | str | None = None
    strategy: RolloutStrategy | str | None = None
    reward: tuple[RewardShaping | str, ...] | RewardShaping | str | None = None
    advantage: Advantage | str | None = None
    loss: PolicyLoss | str | None = None
    batch_size: int = 16
    pool: int | None = None
    num_generations: int | None = None
    minibatches: int = 1
    epochs: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    chat: bool = False
    max_batches: int = 10
    lora: LoRAConfig = LoRAConfig()
    memgen: MemGenConfig = MemGenConfig(WeaverConfig())
    trigger: TriggerConfig = TriggerConfig()
    boundaries: Literal["suffix", "exact_id", "sentence"] = "suffix"
    environment_limit_s: float | None = dataclasses.field(default=30.0, metadata=FREE)
    max_rows: int = dataclasses.field(default=256, metadata=FREE)
    share_prompts: bool = dataclasses.field(default=True, metadata=NOTED)
    examples: int = dataclasses.field(default=2, metadata=FREE)
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, weight_decay=0.0, final_ratio=1.0
    )
    out: str = dataclasses.field(default="runs/rl", metadata=FREE)

    def __post_init__(self):
        super().__post_init__()
        if self.method is None:  # so that a run folder says what it was, by whatever default
            object.__setattr__(self, "method", "trigger" if self.train == "trigger" else "grpo")
        for kind in KINDS:
            object.__setattr__(self, kind, _objects(kind, getattr(self, kind)))
        object.__setattr__(self, "num_generations", self._num_generations())
        if isinstance(self.reward, RewardShaping):
            object.__setattr__(self, "reward", (self.reward,))
        if self.pool is not None and self.pool < 1:
            raise ValueError(
                f"pool={self.pool}: choose 1 or more, or leave it out for all problems"
            )
        least = {"minibatches": 1, "epochs": 1, "max_batches": 1, "max_rows": 1,
                 "max_new_tokens": 1, "num_generations": 1, "examples": 0}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)}: choose {bound} or more")
        limit = self.environment_limit_s
        if limit is not None and not limit > 0:
            raise ValueError(
                f"environment_limit_s={limit}: choose a number of seconds above 0, or None"
            )
        greedy = self.temperature == 0 and self.train == "trigger"
        if not (greedy or 0 < self.temperature < math.inf):
            raise ValueError(
                f"temperature={self.temperature}: choose a number above 0 (at 0 all rollouts of a "
                "problem would be equal, unless a trigger is sampled)"
            )
        if 0 < self.temperature < _COLDEST:
            raise ValueError(f"temperature={self.temperature}: choose {_COLDEST} or more")
        self._check_parts()

    def _num_generations(self) -> int:
        """Return the number of rollouts of each problem: this config's, the method's, or 8."""
        mine, of_method = self.num_generations, self.recipe.num_generations
        if mine is None:
            return _NUM_GENERATIONS if of_method is None else of_method
        if of_method not in (None, mine, type(self.recipe).num_generations):
            raise ValueError(
                f"num_generations={mine} of the run and {of_method} of method {self.recipe.word}: "
                "leave one of them out"
            )
        return mine

    def _check_parts(self) -> None:
        """Raise a `ValueError` for parts that do not fit each other or the run."""
        method, parts = self.recipe, self.parts
        if self.rollouts > _MOST_ROLLOUTS:
            raise ValueError(
                f"batch_size={self.batch_size} problems with num_generations="
                f"{self.num_generations} are {self.rollouts:,} rollouts a step: choose "
                f"{_MOST_ROLLOUTS:,} at most"
            )
        alone = self.rollouts < 2 * self.batch_size
        given = method.reference_reset != type(method).reference_reset
        if given and method.reference_reset and not parts.loss.uses_reference:
            raise ValueError(
                f"reference_reset={method.reference_reset} of method {method.word} is of the "
                "reference of a KL penalty, and the loss has none: choose kl above 0, or "
                "reference_reset=None"
            )
        if alone and parts.advantage.compares:
            raise ValueError(
                f"num_generations={self.num_generations}: {parts.advantage.word} compares rollouts "
                "of one problem: choose 2 or more"
            )
        if alone and method.filter_groups:
            raise ValueError(
                f"filter_groups keeps no group of num_generations={self.num_generations}: choose 2 "
                "or more"
            )
        if parts.advantage.by_turn and parts.reward:
            raise ValueError(
                f"{parts.advantage.word} goes by the rewards of turns, which no reward shaping "
                "changes: leave reward out, or choose another advantage"
            )
        if parts.advantage.value_loss is not None:
            self._check_critic(parts)
        if parts.loss.uses_sampler and self.train == "trigger":
            raise ValueError(
                f"{text_of(parts.loss.word, parts.loss)} weighs tokens by the sampler's "
                "probabilities (importance_cap), train='trigger' learns decisions: leave that out"
            )
        strategy = parts.strategy
        if parts.loss.uses_sampler and strategy is not None and not strategy.on_policy:
            raise ValueError(
                f"{text_of(parts.loss.word, parts.loss)} weighs tokens by the sampler's "
                f"probabilities (importance_cap), and strategy {strategy.word} trains on solutions "
                "of earlier policies too: leave that out"
            )
        for kind in (
            kind for kind in KINDS if kind != "method" and getattr(self, kind) is not None
        ):
            self._check_replaced(kind)
        parts.allocator.check(self)
        for shaping in parts.reward:
            shaping.check(self)

    def _check_critic(self, parts: Parts) -> None:
        """Raise a `ValueError` if the run can't have the value head that the advantage needs."""
        needs = f"advantage {parts.advantage.word} needs a value head"
        if self.train == "trigger":
            raise ValueError(
                f"{needs}, which values states before tokens, and train='trigger' learns decisions "
                "between them: choose another advantage such as dr_grpo"
            )
        strategy, loss = parts.strategy, parts.loss
        if strategy is not None and not strategy.on_policy:
            raise ValueError(
                f"{needs}, which learns from samples of the policy, and what strategy "
                f"{strategy.word} finds is none: choose another advantage such as tree, or leave "
                "strategy out"
            )
        if type(loss).reduce is PolicyLoss.reduce:
            raise ValueError(
                f"{needs}, and loss {loss.word} has no `reduce` by which its loss could be added: "
                "write one (PolicyLoss), or choose another loss such as clipped"
            )

    def _check_replaced(self, kind: str) -> None:
        """Raise a `ValueError` if the method has a changed option of the replaced part `kind`."""
        method, given = self.recipe, getattr(self, kind)
        for field in dataclasses.fields(method):
            value = getattr(method, field.name)
            without = dataclasses.replace(method, **{field.name: field.default})
            if value != field.default and getattr(without, kind) != getattr(method, kind):
                texts = given if isinstance(given, tuple) else (given,)
                written = " ".join(text_of(part.word, part) for part in texts) or "()"
                raise ValueError(
                    f"{field.name}={value} of method {method.word} is of its {kind}, which {kind} "
                    f"{written} replaces: write it there"
                )

    @property
    def recipe(self) -> Method:
        """Method of the run, whose fields are its options."""
        assert isinstance(self.method, Method)
        return self.method

    @property
    def parts(self) -> Parts:
        """Parts of the run: this config's parts, and the method's where this config has None."""
        names = [field.name for field in dataclasses.fields(Parts)]
        given = {name: getattr(self, name) for name in names}
        return Parts(
            **{
                name: getattr(self.recipe, name) if value is None else value
                for name, value in given.items()
            }
        )

    @property
    def rollouts(self) -> int:
        """Number of rollouts per batch of problems: `batch_size` times `num_generations`."""
        assert self.num_generations is not None  # resolved
        return self.batch_size * self.num_generations

    @property
    def scaled_optimizer(self) -> OptimizerConfig:
        """Optimizer config with the learning rate times the method's `learning_rate_scale`."""
        scale = self.recipe.learning_rate_scale(self.batch_size, self.rollouts // self.batch_size)
        rate = self.optimizer.learning_rate * scale
        return dataclasses.replace(self.optimizer, learning_rate=rate)

    @property
    def updates(self) -> int:
        """Number of optimizer steps in a step of the run: `minibatches` times `epochs`."""
        return self.minibatches * self.epochs


def _objects(kind: str, value: Any) -> Any:
    """Return an option's value in which each text is parsed into a part; None stays None."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return tuple(_objects(kind, item) for item in value)
    return part_from_text(kind, value) if isinstance(value, str) else checked(kind, value)
