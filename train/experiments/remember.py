"""Train both stages of MemGen by reinforcement learning: the weaver, then a trigger with a penalty.

python -m train.experiments.remember --out remember.jsonl
python -m train.experiments.remember --report remember.jsonl

A small decoder is pretrained to copy and to reverse three digits; only 2 % of the texts sort
digits, so that the decoder seldom sorts correctly. Then the decoder is frozen. A weaver is trained
on all three kinds of questions: first with supervision, which is stopped early, and then by GRPO
(the control is more supervised training). Then this weaver is frozen too, and a trigger learns by
GRPO when memory is worth the penalty on each invocation.
Each finished run (arm and seed) is one line of the file; a second call trains only missing runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from memgen import (
    AlwaysInvoke,
    LearnedInvoke,
    LoRAConfig,
    MemGen,
    MemGenConfig,
    NeverInvoke,
    RandomInvoke,
    TriggerConfig,
    TriggerPolicy,
    WeaverConfig,
)
from thoughtbubbles import ModelConfig, Thoughtbubbles
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.data import ByteTokenizer
from train.devices.mesh import MeshConfig, make_mesh
from train.engine.optim import OptimizerConfig
from train.experiments.questions import (
    HELD_OUT,
    KINDS,
    LENGTH,
    MAX_NEW_TOKENS,
    Questions,
    batches,
    curves,
    fit,
)
from train.experiments.remember_tables import ALWAYS, START, report
from train.experiments.study import Result, Results, StudyConfig, check_names, run_study
from train.models.finetunable import Method
from train.models.load import LanguageModel, checksum
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.learning.penalties import InvocationPenalty
from train.rl.methods import TriggerGRPO
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.sampler import Sampler, Sampling
from train.rl.rollout.strategies import OneResponse
from train.rl.types import Trajectory

PRETRAINING = {"copy": 0.49, "reverse": 0.49, "sort": 0.02}
WEAVING = {"copy": 0.25, "reverse": 0.25, "sort": 0.5}
# Probabilities of kinds of questions in a trigger's training, and weights of held-out means.
QUESTIONS = {"copy": 0.4, "reverse": 0.4, "sort": 0.2}
ALL_LINEAR = ("q", "k", "v", "o", "up", "down")
REASONER = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size, embed_dim=48, num_layers=2, num_heads=4, mlp_dim=192
)
MEMGEN = MemGenConfig(
    WeaverConfig(4, 4, latents_see_latents=False, lora=LoRAConfig(8, 16.0, targets=ALL_LINEAR)),
    max_inference_events=LENGTH - 1,
    insertion="random",  # the weaver also learns from texts without memory at some boundaries
)
TRIGGER = TriggerConfig("tokens", lora=LoRAConfig(8, 16.0, targets=ALL_LINEAR))


@dataclasses.dataclass(frozen=True)
class Trained:
    """Model of an arm, and the cost of the last stage of its training.

    Attributes:
        policy: Trained model, a frozen reasoner with latent memory.
        memory: Trigger policy with which the model is evaluated.
        cost: Mapping with the numbers of optimizer `steps`, `rollouts` and sampled `tokens` of the
            arm's last training stage; a missing entry stands for 0.
        curve: Learning curves of reinforcement learning (`train.experiments.questions.curves`);
            empty after supervision.
    """

    policy: MemGen
    memory: TriggerPolicy
    cost: Mapping[str, float]
    curve: Mapping[str, list[float | None]] = dataclasses.field(default_factory=dict)


class Stages:
    """Models that the arms of a seed share; each model is trained lazily, at its first use.

    Args:
        config: Options of the experiment.
        seed: Seed of parameters and data.
    """

    def __init__(self, config: "Experiment", seed: int):
        self.config, self.seed = config, seed

    def _supervised(
        self, lm: LanguageModel, method: Method, stream: int, rate: float, final: float, steps: int
    ) -> LanguageModel:
        kinds = PRETRAINING if method == "all" else WEAVING
        data = batches((self.seed, stream), self.config.batch_size, kinds)
        optimizer = OptimizerConfig(learning_rate=rate, weight_decay=0.0, final_ratio=final)
        return fit(lm, method, data, steps, optimizer, self.seed, MEMGEN)

    @functools.cached_property
    def reasoner(self) -> LanguageModel:
        """The pretrained decoder."""
        model = Thoughtbubbles(REASONER, rngs=nnx.Rngs(self.seed))
        lm = LanguageModel(model, ByteTokenizer())
        steps = self.config.pretrain_steps
        return self._supervised(lm, "all", stream=0, rate=3e-3, final=0.1, steps=steps)

    @functools.cached_property
    def taught(self) -> LanguageModel:
        """The decoder with a weaver after `sft_steps` steps without learning-rate decay."""
        steps = self.config.sft_steps
        return self._supervised(
            self.reasoner, "weaver", stream=1, rate=1e-2, final=1.0, steps=steps
        )

    @functools.cached_property
    def taught_more(self) -> LanguageModel:
        """The decoder with the weaver of `taught` after `weaver_steps` more supervised steps."""
        steps = self.config.weaver_steps
        return self._supervised(self.taught, "weaver", stream=2, rate=1e-2, final=0.1, steps=steps)

    @functools.cached_property
    def rewarded(self) -> tuple[LanguageModel, Trained]:
        """The decoder with the weaver of `taught` after GRPO, and the same model as a `Trained`."""
        config = self.config
        trained = self.reinforced(
            self.taught,
            method="grpo",
            train="weaver",
            steps=config.weaver_steps,
            batch_size=config.weaver_problems,
            optimizer=OptimizerConfig(learning_rate=config.weaver_rate, weight_decay=0.0),
        )
        return LanguageModel(self.reasoner.model, ByteTokenizer(), trained.policy), trained

    def triggered(self, penalty: InvocationPenalty, **changes: Any) -> Trained:
        """Train a trigger for the weaver of `rewarded`, on greedy tokens and sampled decisions.

        By default (`TriggerGRPO`), advantages are not divided by the standard deviation of rewards.
        With the division, in a group whose answers are all right, even the smallest penalty would
        give advantages of full size, and all kinds of questions would train the trigger to skip
        memory. A trigger that never invokes memory learns nothing more. A KL penalty therefore
        keeps the trigger near its initial policy, which invokes memory with probability 1/2.

        Args:
            penalty: Penalty on invocations, the only reward shaping.
            changes: Fields of `RLConfig` to change, such as `method`.
        """
        config = self.config
        options = {"method": TriggerGRPO(kl=config.hold)} | changes
        return self.reinforced(
            self.rewarded[0],
            train="trigger",
            steps=config.trigger_steps,
            batch_size=config.trigger_problems,
            temperature=0.0,
            reward=(penalty,),
            trigger=TRIGGER,
            optimizer=OptimizerConfig(
                learning_rate=config.trigger_rate, weight_decay=0.0, final_ratio=0.3
            ),
            **options,
        )

    def reinforced(self, lm: LanguageModel, **changes: Any) -> Trained:
        """Train by reinforcement learning without a run folder.

        Args:
            lm: Model to start from.
            changes: Fields of `RLConfig` except `num_generations`, `max_new_tokens` and `seed`.

        Returns:
            The trained model, its cost and learning curves, and its rollouts' trigger policy.
        """
        config = RLConfig(
            num_generations=self.config.num_generations,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=self.seed,
            **changes,
        )
        task = Questions(self.seed, WEAVING if config.train == "weaver" else QUESTIONS)
        job = RLJob(config, lm, task, devices=jax.devices()[:1])
        state, drawn = job.first_state(), []
        for _ in range(config.steps):
            state, _, collected = job.step(state)
            drawn.append(collected.drawn)
        return Trained(
            job.trainable.model(state.variables).memgen,
            job.sampling().trigger_policy,
            {
                "steps": config.steps,
                "rollouts": sum(map(len, drawn)),
                "tokens": sum(row.num_generated for rows in drawn for row in rows),
            },
            curves(drawn),
        )


def _frozen(stages: Stages) -> Trained:
    return Trained(_memgen(stages.taught), NeverInvoke(), {})


def _taught(stages: Stages) -> Trained:
    return Trained(_memgen(stages.taught), AlwaysInvoke(), {"steps": stages.config.sft_steps})


def _taught_more(stages: Stages) -> Trained:
    cost = {"steps": stages.config.weaver_steps}
    return Trained(_memgen(stages.taught_more), AlwaysInvoke(), cost)


def _divided(stages: Stages) -> Trained:
    return stages.triggered(InvocationPenalty(stages.config.price), method="grpo")


def _priced(stages: Stages) -> Trained:
    return stages.triggered(InvocationPenalty(stages.config.price))


def _priced_by_tokens(stages: Stages) -> Trained:
    return stages.triggered(InvocationPenalty(stages.config.price, "tokens", "batch"))


def _memgen(lm: LanguageModel) -> MemGen:
    assert lm.memgen is not None
    return lm.memgen


SETTINGS = (
    "pretrain_steps", "sft_steps", "weaver_steps", "trigger_steps", "batch_size", "weaver_problems",
    "trigger_problems", "num_generations", "weaver_rate", "trigger_rate", "price", "hold",
    "held_out",
)  # fmt: skip
"""Options that all results of a file must share."""

COIN = RandomInvoke(TRIGGER.init_invoke_prob)  # invokes with an untrained trigger's probability
ARMS: dict[str, Callable[[Stages], Trained]] = {
    "reasoner alone": _frozen,
    "weaver, supervised": _taught,
    "weaver, more supervision": _taught_more,
    ALWAYS: lambda stages: stages.rewarded[1],
    START: lambda stages: Trained(stages.rewarded[1].policy, COIN, {}),
    "trigger, penalty by decisions": _priced,
    "trigger, penalty 0": lambda stages: stages.triggered(InvocationPenalty(0.0)),
    "trigger, penalty by tokens": _priced_by_tokens,
    "trigger, as GRPO has it": _divided,
}


@dataclasses.dataclass(frozen=True)
class Experiment(StudyConfig):
    """Trains and evaluates arms, or reports stored results.

    Attributes:
        arms: Names of the arms, all by default.
        pretrain_steps: Number of pretraining steps of the decoder.
        sft_steps: Number of supervised steps of the weaver before GRPO.
        weaver_steps: Number of steps of GRPO on the weaver, and of supervised steps of the arm
            "weaver, more supervision".
        trigger_steps: Number of steps of GRPO on the trigger.
        batch_size: Number of rows of a supervised step.
        weaver_problems: Number of questions in a step of GRPO on the weaver.
        trigger_problems: Number of questions in a step of GRPO on the trigger.
        num_generations: Number of answers to each question in a step of GRPO.
        weaver_rate: Peak learning rate of GRPO on the weaver.
        trigger_rate: Peak learning rate of GRPO on the trigger.
        price: Weight of the reward penalty on invocations of memory.
        hold: Weight of the KL penalty that keeps the trigger near its initial policy.
        held_out: Number of held-out questions of each kind, at most 300.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    pretrain_steps: int = 800
    sft_steps: int = 400
    weaver_steps: int = 60
    trigger_steps: int = 140
    batch_size: int = 64
    weaver_problems: int = 32
    trigger_problems: int = 16
    num_generations: int = 8
    weaver_rate: float = 1e-3
    trigger_rate: float = 5e-3
    price: float = 0.1
    hold: float = 0.02
    held_out: int = HELD_OUT
    out: str = "remember.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("arm", self.arms, ARMS)
        if self.held_out > HELD_OUT:
            raise ValueError(
                f"held_out={self.held_out}: there are {HELD_OUT} held-out questions of each kind, "
                "choose at most that many"
            )


def main(config: Experiment) -> None:
    """Train the runs that the file of results lacks, or print the tables."""
    run_study(config, ("arm", "seed"), train_missing, report, SETTINGS)


def train_missing(config: Experiment, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    The arms of a seed share one `Stages`.
    """
    for seed in config.seeds:
        stages = Stages(config, seed)
        for run in results.missing({"arm": arm, "seed": seed} for arm in config.arms):
            result = run | run_arm(stages, run["arm"])
            yield result, f"seed {seed}, {run['arm']}: {readable(result)}"


def run_arm(stages: Stages, arm: str) -> dict[str, Any]:
    """Train and evaluate an arm.

    Args:
        stages: Models of the seed.
        arm: Name of the arm in `ARMS`.

    Returns:
        Entries of a result: checksums of the frozen decoder (`reasoner`) and of the `weaver`; the
        cost of the last stage as `steps`, `rollouts` and `tokens`; the entries of `held_out`; the
        version of `jax`; and `curve`, if the arm has learning curves. `seconds` is the training
        time without pretraining and evaluation; the time of shared models counts for the first arm
        that uses them. An arm with a trained trigger is evaluated with sampled decisions, and also
        has `argmax`, the held-out results with the trigger's more probable decisions, and `coin`,
        the held-out results with random decisions at the same rate.

    Raises:
        RuntimeError: The frozen decoder changed.
    """
    before, clock = checksum(stages.reasoner.model), Clock()
    trained = ARMS[arm](stages)
    seconds = clock.read().seconds
    after = checksum(trained.policy.reasoner.model)  # pyright: ignore (a Backbone)
    if before != after:
        raise RuntimeError(f"the frozen reasoner changed: {before} became {after}")
    result = {
        "reasoner": before,
        "weaver": checksum(trained.policy.weaver),
        "seconds": seconds,
        **{name: trained.cost.get(name, 0) for name in ("steps", "rollouts", "tokens")},
        **held_out(stages, trained.policy, trained.memory),
    }
    if isinstance(trained.memory, LearnedInvoke):
        result["argmax"] = held_out(stages, trained.policy, LearnedInvoke())
        rate = result["rate"]
        result["coin"] = held_out(stages, trained.policy, RandomInvoke(rate))
    if trained.curve:
        result["curve"] = trained.curve
    return result | {"jax": jax.__version__}


def held_out(stages: Stages, policy: MemGen, memory: TriggerPolicy) -> dict[str, Any]:
    """Evaluate a model on held-out questions of each kind, with greedy tokens.

    Args:
        stages: Models of the seed.
        policy: Model to evaluate.
        memory: Trigger policy.

    Returns:
        Entries of a result. Means over kinds of questions, with the mixture weights `QUESTIONS`:
        `accuracy` with its `standard_error` over questions, `invocations` per response, and `rate`,
        the fraction of trigger decisions that invoke memory. `kinds` maps each kind to a dict of
        its `accuracy`; its `invocations` and decisions (`asked`) per response; and `places`, a list
        of the fractions of responses with memory before token 0, 1, and so on.
    """
    lm = stages.reasoner
    tokenizer = lm.tokenizer
    sampling = Sampling(0.0, tokenizer.vocab_size, lm.stop_ids, memory)
    sampler = Sampler(policy, sampling, 512, make_mesh(MeshConfig(), jax.devices()[:1]))
    task = Questions(stages.seed, QUESTIONS)
    problems = [task.problem("test", i) for i in range(len(KINDS) * stages.config.held_out)]
    collect = OneResponse(formatter=PromptFormatter(lm), max_new_tokens=MAX_NEW_TOKENS).collect
    found = collect(sampler, task, problems, [1] * len(problems), (stages.seed, 3))
    kinds = {kind: _summary([row for row in found if row.problem.kind == kind]) for kind in KINDS}

    def mean(name: str) -> float:
        return sum(share * kinds[kind][name] for kind, share in QUESTIONS.items())

    variance = sum(
        share**2 * kinds[kind]["accuracy"] * (1 - kinds[kind]["accuracy"]) / stages.config.held_out
        for kind, share in QUESTIONS.items()
    )
    return {
        "accuracy": mean("accuracy"),
        "standard_error": variance**0.5,
        "invocations": mean("invocations"),
        "rate": mean("invocations") / max(mean("asked"), 1e-9),
        "kinds": kinds,
    }


def _summary(found: Sequence[Trajectory]) -> dict[str, Any]:
    decisions = np.full((len(found), MAX_NEW_TOKENS), -1)
    for row, trajectory in zip(decisions, found, strict=True):
        made = trajectory.decisions[trajectory.begins[0] :]
        row[: len(made)] = made
    return {
        "accuracy": float(np.mean([row.reward.success for row in found])),
        "asked": float((decisions >= 0).sum(axis=1).mean()),
        "invocations": float((decisions == 1).sum(axis=1).mean()),
        "places": (decisions == 1).mean(axis=0).round(4).tolist(),
    }


def readable(result: dict[str, Any]) -> str:
    """Format a result as one line of text."""
    kinds = ", ".join(
        f"{kind} {found['accuracy']:.1%} ({found['invocations']:.2f})"
        for kind, found in result["kinds"].items()
    )
    return (
        f"{result['accuracy']:.1%} right, {result['invocations']:.2f} invocations a response; "
        f"{kinds}; {result['seconds']:.0f} s"
    )


def command() -> None:
    run_command(main, Experiment)


if __name__ == "__main__":
    command()
