"""RLJob: the policy, collector and learner of a run of reinforcement learning."""

import copy
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx import filterlib
from jax.sharding import Mesh

import memgen
from memgen import LoRAConfig, MemGen, MemGenConfig
from thoughtbubbles import Architecture, ArchitectureConfig
from thoughtbubbles.architecture import architecture_of
from train.cli.calls import text_of
from train.cli.config_json import as_json
from train.devices.attention import Attention
from train.devices.mesh import batch_axes, check_auto, make_mesh
from train.engine.memory import training_memory
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, TrainState, make_trainable, resolved
from train.models import finetunable
from train.models.finetunable import TRAINED, FinetunableModel, ValueParam
from train.models.load import (
    LanguageModel,
    boundaries_for,
    checksum,
    load_language_model_on,
    tokenizer_meta,
    trained_before,
)
from train.rl.config import RLConfig
from train.rl.learning.credit import assign_advantages, shaped_rewards
from train.rl.learning.critic import value_metrics, with_value_rate
from train.rl.learning.learner import Learner
from train.rl.learning.policy import sampler_of
from train.rl.learning.reference import Reference
from train.rl.named_tasks import make_task
from train.rl.parts import KINDS
from train.rl.rollout.collector import Collector, fingerprint, strategy_for
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.rows import Rows, make_rows
from train.rl.rollout.sampler import Sampler, Sampling
from train.rl.step_metrics import (
    held_out_metrics,
    learning_metrics,
    rollout_metrics,
    timing_metrics,
)
from train.rl.types import Collected, Episodes, Trajectory


@dataclasses.dataclass(frozen=True)
class PolicyWrapper:
    """Callable that wraps a decoder in the `FinetunableModel` that is trained.

    Wrappers with equal fields are equal, so that equal runs share compiled programs.

    Attributes:
        boundary: Bytes of the table `[V]` uint8 of tokens after which memory may be written; None
            without latent memory.
        seed: Seed of new parameters.
        train, lora, memgen, value_head: As in `FinetunableModel`, whose `method` is `train`.
    """

    train: finetunable.Method
    lora: LoRAConfig
    memgen: MemGenConfig
    boundary: bytes | None
    seed: int
    value_head: bool = False
    value_rate_factor: float = 1.0
    """Factor on the learning rate of the value head."""

    @property
    def trained(self) -> filterlib.Filter:
        """Flax NNX filter of the parameters that are trained."""
        return (TRAINED[self.train], ValueParam) if self.value_head else TRAINED[self.train]

    def __call__(self, model: Architecture) -> FinetunableModel:
        return FinetunableModel(
            model,
            self.train,
            lora=self.lora,
            memgen=self.memgen,
            boundary=None if self.boundary is None else np.frombuffer(self.boundary, np.uint8),
            rngs=nnx.Rngs(self.seed),
            value_head=self.value_head,
        )


def trainable_of(
    model: ArchitectureConfig,
    optimizer: OptimizerConfig,
    steps: int,
    mesh: Mesh,
    seed: int,
    attention: Attention,
    wrap: PolicyWrapper,
) -> Trainable:
    """Return the `Trainable` of a policy, the same object for equal arguments.

    Runs of one `Trainable` share compiled programs.

    Args:
        model: Config of the decoder.
        optimizer: Optimizer and schedule.
        steps: Number of optimizer steps of the schedule.
        mesh: Mesh of the run's devices.
        seed: Seed of the run.
        attention: Implementation of attention.
        wrap: Callable that wraps the decoder in the model that is trained.
    """
    key = (architecture_of(model), model, optimizer, steps, mesh, seed, attention, wrap)
    try:
        hash(key)
    except TypeError:  # unhashable options such as lists: nothing is shared
        return _trainable_of.__wrapped__(*key)
    return _trainable_of(*key)


@functools.lru_cache(maxsize=16)
def _trainable_of(architecture: Any, *arguments: Any) -> Trainable:
    del architecture  # only a part of the cache's key, which tells redefined classes apart
    wrap: PolicyWrapper = arguments[-1]
    made = make_trainable(*arguments[:-1], wrap.trained, wrap)  # pyright: ignore[reportCallIssue]
    factor = wrap.value_rate_factor
    if factor == 1:
        return made
    return dataclasses.replace(made, optimizer=with_value_rate(made.optimizer, factor))


class RLJob:
    """A run of reinforcement learning without its loop (`train.rl.loop.train`).

    Args:
        config: Config of the run.
        lm: Language model to start from, in place of the model that `config.weights` names.
        task: Task or environment, in place of the task that `config.task` names.
        devices: Devices of the mesh; None for all devices.

    Attributes:
        trainable: Static side of the run: how a `TrainState` is built, updated and placed.
        collector: Collector, which draws problems and samples rollouts.
        learner: Learner, which makes optimizer steps on rollouts.
        reference: Reference policy of the KL penalty.
        steps_done: Number of steps so far.

    Raises:
        ValueError: The config, the weights or the task are invalid or do not fit each other, or
            training needs more memory than is available.
    """

    def __init__(
        self,
        config: RLConfig,
        lm: LanguageModel | None = None,
        task: Any = None,
        devices: Sequence[Any] | None = None,
    ):
        self.config = config
        mesh = make_mesh(config.mesh, devices)
        check_auto(mesh, "reinforcement learning")
        self.lm = load_language_model_on(mesh, config.weights) if lm is None else lm
        model = self.lm.model
        model.check_cacheable()
        self.task = make_task(config.task, config.seed) if task is None else task
        parts = config.parts
        for shaping in parts.reward:
            self.task = shaping.of_task(self.task)
        self._fingerprint = fingerprint(self.task)
        self.memgen, table = self._memory()
        boundary = None if table is None else np.asarray(table, np.uint8).tobytes()
        self._wrap = PolicyWrapper(
            config.train, config.lora, self.memgen, boundary, config.seed,
            parts.advantage.value_loss is not None, _value_rate_factor(config),
        )  # fmt: skip
        self.trainable = trainable_of(
            model.config,
            config.scaled_optimizer,
            config.steps * config.updates,
            mesh,
            config.seed,
            config.attention,
            self._wrap,
        )
        shards = int(np.prod([mesh.shape[name] for name in batch_axes(mesh)]))
        self._multiple = shards * config.minibatches * config.accumulate
        self.collector = Collector(
            config,
            self.task,
            strategy_for(config, self.task, PromptFormatter(self.lm, config.chat)),
            dataclasses.replace(parts.allocator),  # a copy, whose learned state is this run's
        )
        self._responses_per_row = self.collector.strategy.responses_per_row
        self.keeps_frozen = config.train == "all"
        # A checksum of the frozen weights, so that a run resumes only with the same ones.
        holds_all = self.keeps_frozen and not parts.loss.uses_reference
        self._base = None if holds_all else checksum(self.lm.memgen or model)
        longest = config.max_new_tokens * self._responses_per_row
        if not config.dry_run:  # a dry run may describe a run on another machine
            training_memory(self.trainable, config.rollouts, longest).check()
        self._unshared = _why_unshared(config, model)
        self.learner = Learner(
            config, self.trainable, self.sampling(), longest, share_prompts=not self._unshared
        )
        # Number of steps so far. The `TrainState` counts optimizer steps, which a step whose
        # problems are all left out does not make.
        self.steps_done = 0
        self.reference = Reference(
            self.trainable,
            self.first_variables,
            parts.loss.uses_reference,
            config.recipe.reference_reset,
        )

    def _memory(self) -> tuple[MemGenConfig, np.ndarray | None]:
        """Return the config of latent memory, and the table `[V]` of its boundary tokens.

        The table is None where neither a weaver nor a trigger is trained.
        """
        config, woven = self.config, self.lm.memgen
        if config.train in ("all", "lora"):
            if woven is not None:
                raise ValueError(
                    f"{config.weights} holds a weaver, which train={config.train!r} would drop: "
                    "choose weaver or trigger, or the weights that it was trained with"
                )
            return config.memgen, None
        if woven is None and config.train == "trigger":
            raise ValueError(
                f"train='trigger' needs weights with a weaver, {config.weights} has none: train "
                "one first (python -m train.sft --train weaver, or --train weaver here)"
            )
        shape = config.memgen if woven is None else woven.config
        if config.train == "trigger":
            shape = dataclasses.replace(shape, trigger=shape.trigger or config.trigger)
        elif shape.trigger is not None:
            whose = "memgen" if woven is None else config.weights
            raise ValueError(
                f"train='weaver' would drop the trigger of {whose}: leave it out, or choose "
                "train='trigger'"
            )
        if not (self.lm.model.takes_positions or shape.weaver.latents_see_latents):
            raise ValueError(
                "memgen.weaver.latents_see_latents=False reads rows that are not one text, which a "
                "model with fork layers can't: leave it True"
            )
        if woven is not None:
            return shape, np.asarray(woven.boundary[...])
        return shape, boundaries_for(self.lm, config.train, config.boundaries)

    def sampling(self, greedy: bool = False) -> Sampling:
        """Return the options that rollouts are sampled with.

        Args:
            greedy: Whether tokens are sampled at temperature 0, as for held-out problems. The
                decisions of a trigger are always sampled at temperature 1.
        """
        trigger_policy: Any = memgen.NeverInvoke()
        if self.config.train == "weaver":
            trigger_policy = memgen.AlwaysInvoke()
        elif self.config.train == "trigger":
            trigger_policy = memgen.LearnedInvoke(1.0, sample=True)
        tokenizer = self.lm.tokenizer
        temperature = 0.0 if greedy else self.config.temperature
        return Sampling(temperature, tokenizer.vocab_size, self.lm.stop_ids, trigger_policy)

    def first_state(self) -> TrainState:
        """Return the state before the first step, with the variables of `first_variables`."""
        return self.trainable.start(self.first_variables())

    def first_variables(self) -> Any:
        """Return the initial variables as `nnx.State`: those of `lm`, and new parameters.

        New parameters belong to an adapter, latent memory or a value head. The arrays are copies
        because training donates its arrays, while `lm` may be used again.
        """
        policy = self._wrap(self.lm.model)
        if self.lm.memgen is not None and policy.memgen is not None:
            policy.memgen = nnx.data(trained_before(self.lm.memgen, policy.memgen))
        return jax.tree.map(lambda leaf: leaf.copy(), nnx.state(policy))

    @property
    def meta(self) -> dict[str, Any]:
        """JSON-serializable metadata of a checkpoint.

        The dict has the config of the run and of the model, fingerprints of the task and of the
        frozen weights, the tokenizer, and under "rl" the number of steps and the collector's state.
        """
        return {
            "config": as_json(self.config),
            "data_fingerprint": self._fingerprint,
            "tokenizer": self.lm.tokenizer.to_json(),
            "base": self._base,
            "resolved": resolved(self.trainable),
            "model": as_json(self.trainable.config),
            "rl": {"step": self.steps_done, **copy.deepcopy(self.collector.state)},
            **tokenizer_meta(self.lm.tokenizer),
        }

    def restore(self, meta: dict[str, Any]) -> None:
        """Restore the number of steps and the collector's state from a checkpoint's `meta`."""
        self.steps_done = meta["rl"]["step"]
        self.collector.restore(meta["rl"])

    def sampler(self, variables: Any, greedy: bool = False) -> Sampler:
        """Return a sampler of rollouts.

        Args:
            variables: Variables of the policy (`TrainState.variables`).
            greedy: Whether tokens are sampled at temperature 0 (see `sampling`).
        """
        policy: MemGen = sampler_of(self.trainable.model(variables))
        return Sampler(policy, self.sampling(greedy), self.config.max_rows, self.trainable.mesh)

    def collect(self, variables: Any) -> Collected:
        """Sample the rollouts of one step with a policy's variables; advance to new problems."""
        return self.collector.collect(self.sampler(variables))

    def step(self, state: TrainState) -> tuple[TrainState, dict[str, float], Collected]:
        """Collect rollouts, assign advantages, and update the policy.

        Args:
            state: State before the step; it is donated.

        Returns:
            State after the step, metrics keyed by name, and the rollouts.
        """
        begin = time.perf_counter()
        collected = self.collect(state.variables)
        sampled = time.perf_counter()
        metrics = rollout_metrics(collected)
        self.reference.reset_if_due(self.steps_done, state.params)
        if collected.trajectories:
            rng = np.random.default_rng([self.config.seed, self.steps_done])
            rows = self.rows(collected.trajectories, state.variables)
            state, learned = self.learner.update(state, rows, rng, self.reference.params)
            metrics |= learning_metrics(learned)
            if "values" in rows:
                metrics |= value_metrics(rows)
        self.steps_done += 1
        metrics |= timing_metrics(
            collected, self.config.epochs, sampled - begin, time.perf_counter() - sampled
        )
        return state, metrics, collected

    def rows(self, trajectories: Sequence[Trajectory], variables: Any) -> Rows:
        """Convert trajectories to padded rows with advantages, for the learner.

        Args:
            trajectories: Trajectories that are trained on.
            variables: Variables of the policy that sampled the trajectories
                (`TrainState.variables`), used only if the policy has a value head.

        Returns:
            Mapping from name to array, as of `make_rows`. With a value head the mapping has three
            more arrays `[K, L]`, for `K` rows of `L` tokens: `values`, `returns`, and `old`, the
            log-probabilities under `variables`.
        """
        config, shape = self.config, (self._multiple, self.events_per_row)
        if config.parts.advantage.value_loss is None:
            episodes = Episodes.from_trajectories(trajectories)
            return make_rows(
                trajectories, assign_advantages(trajectories, episodes, config), *shape
            )
        nothing = [np.zeros(len(row.tokens)) for row in trajectories]
        old, values = self.learner.score_values(variables, make_rows(trajectories, nothing, *shape))
        trajectories = [
            dataclasses.replace(row, values=mine[: len(row.tokens)].astype(np.float64))
            for row, mine in zip(trajectories, values, strict=False)
        ]
        episodes = Episodes.from_trajectories(trajectories)
        reward = shaped_rewards(trajectories, episodes, config)
        returns = config.parts.advantage.value_targets(trajectories, episodes, reward)
        advantages = assign_advantages(trajectories, episodes, config)
        return make_rows(trajectories, advantages, *shape, returns) | {"old": old}

    @property
    def events_per_row(self) -> int:
        """Maximum number of events of latent memory in a row; 0 without latent memory."""
        if self.config.train in ("all", "lora"):
            return 0
        return self._responses_per_row * self.memgen.events

    def evaluate(self, variables: Any) -> tuple[dict[str, float], list[Trajectory]]:
        """Evaluate the policy by one greedily decoded episode of each held-out problem.

        Args:
            variables: Variables of the policy (`TrainState.variables`).

        Returns:
            Metrics keyed by name (`held_out_metrics`), and the trajectories of the episodes.
        """
        rows = self.collector.held_out(self.sampler(variables, greedy=True))
        return held_out_metrics(rows), rows

    def describe(self) -> str:
        """Describe the run in one line, which is printed at its start."""
        config, trainable = self.config, self.trainable
        replaced = [
            f"{kind} {_written(given)} in place of {_written(getattr(config.recipe, kind))}"
            for kind in KINDS
            if kind != "method" and (given := getattr(config, kind)) is not None
        ]
        method = " with ".join([config.recipe.word, *filter(None, [", ".join(replaced)])])
        scaled = config.scaled_optimizer.learning_rate
        rate = "" if scaled == config.optimizer.learning_rate else f", learning rate {scaled:.3g}"
        sizes = " x ".join(f"{name} {size}" for name, size in trainable.mesh.shape.items())
        return (
            f"{config.weights}: {trainable.config.num_params():,} parameters, trained are "
            f"{trainable.num_trained:,} ({config.train}); {method} on "
            f"{self.task.name}, {config.batch_size} problems x {config.num_generations} rollouts x "
            f"{config.updates} updates a step{rate}; {sizes}; prompts are "
            + (
                f"not shared in updates: {self._unshared}"
                if self._unshared
                else "shared in updates"
            )
        )


def _why_unshared(config: RLConfig, model: Architecture) -> str:
    """Return the reason why updates do not share prompts; empty where they do."""
    if not config.share_prompts:
        return "share_prompts=False"
    if config.train in ("weaver", "trigger"):
        return "latent memory is woven into each rollout"
    if model.fork_policy is not None:
        return "the model forks"
    if not model.takes_positions or not hasattr(model.backbone(), "branch_states"):
        return f"{type(model).__name__} computes no branches"
    return ""


def _value_rate_factor(config: RLConfig) -> float:
    """Return the ratio of the value head's learning rate to the policy's; 1 by default."""
    rate = config.parts.advantage.value_rate
    return 1.0 if rate is None else rate / config.scaled_optimizer.learning_rate


def _written(parts: Any) -> str:
    """Format a part, several parts, or None as on the command line; "none" if there is no part."""
    parts = parts if isinstance(parts, tuple) else (parts,)
    return " ".join(text_of(part.word, part) for part in parts if part is not None) or "none"
