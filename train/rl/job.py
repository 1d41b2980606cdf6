"""A run of reinforcement learning: a policy, its task, and what one step does."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import memgen
from memgen import LoRAConfig, MemGen, MemGenConfig
from thoughtbubbles import Architecture, ArchitectureConfig
from train.cli.config_json import as_json
from train.devices.attention import Attention
from train.devices.mesh import BATCH_AXES, make_mesh
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, TrainState, make_trainable, resolved
from train.models import finetunable
from train.models.finetunable import TRAINED, FinetunableModel
from train.models.load import (
    LanguageModel,
    boundaries_for,
    checksum,
    load_language_model_on,
    tokenizer_meta,
    trained_before,
)
from train.rl.config import RLConfig
from train.rl.learning.credit import assign_advantages
from train.rl.learning.learner import Learner
from train.rl.learning.policy import sampler_of
from train.rl.named_tasks import make_task
from train.rl.rollout.rows import make_rows
from train.rl.rollout.sampler import Sampler, Sampling
from train.rl.rollout.strategies import OneResponse, PromptFormatter, RolloutStrategy, Turns
from train.rl.step_metrics import (
    invocations,
    learning_metrics,
    mixed_groups,
    rollout_metrics,
    standard_error,
)
from train.rl.types import Collected, Episodes, Problem, Split, Trajectory

FEW = 32  # problems of an endless task that a run is known by
ENDLESS = 256  # of its held-out problems that are scored if all are asked for


@dataclasses.dataclass
class Progressed:
    """What a run remembers besides its weights; all of it is in checkpoints.

    Attributes:
        step: Number of steps so far. Optimizer steps are counted in the `TrainState`: a step whose
            problems are all left out makes none.
        position: Number of problems drawn so far.
        allocator: State of the budget allocator.
        strategy: State of the rollout strategy.
    """

    step: int = 0
    position: int = 0
    allocator: Any = None
    strategy: Any = None


@dataclasses.dataclass(frozen=True)
class Around:
    """What is built around a decoder to be trained: a description that equal runs share."""

    train: finetunable.Method
    lora: LoRAConfig
    memgen: MemGenConfig
    boundary: tuple[int, ...] | None
    seed: int

    def __call__(self, model: Architecture) -> FinetunableModel:
        return FinetunableModel(
            model,
            self.train,
            lora=self.lora,
            memgen=self.memgen,
            boundary=None if self.boundary is None else np.array(self.boundary, np.uint8),
            rngs=nnx.Rngs(self.seed),
        )


@functools.lru_cache(maxsize=16)
def trainable_of(
    model: ArchitectureConfig,
    optimizer: OptimizerConfig,
    steps: int,
    mesh: Mesh,
    seed: int,
    attention: Attention,
    around: Around,
) -> Trainable:
    """`make_trainable`, one for equal arguments, so that equal runs share compiled programs."""
    return make_trainable(
        model, optimizer, steps, mesh, seed, attention, TRAINED[around.train], around
    )


class RLJob:
    """All of a run but its loop.

    Args:
        config: Config of the run.
        lm: Weights to start from, in place of those that `config.weights` names.
        task: Task or environment, in place of the one that `config.task` names.
        devices: Devices of the mesh; all if not given.

    Raises:
        ValueError: The config, the weights or the task have a mistake, or do not fit each other.
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
        self.lm = load_language_model_on(mesh, config.weights) if lm is None else lm
        model = self.lm.model
        model.check_cacheable()
        self.task = make_task(config.task, config.seed) if task is None else task
        self.episodic = hasattr(self.task, "step")
        self._fingerprint = fingerprint(self.task)
        self.memgen, self._boundary = self._memory()
        boundary = None if self._boundary is None else tuple(self._boundary.tolist())
        self._around = Around(config.train, config.lora, self.memgen, boundary, config.seed)
        self.trainable = trainable_of(
            model.config,
            config.optimizer,
            config.steps * config.updates,
            mesh,
            config.seed,
            config.attention,
            self._around,
        )
        shards = int(np.prod([mesh.shape[name] for name in BATCH_AXES]))
        self._multiple = shards * config.minibatches * config.accumulate
        parts = config.parts
        self.strategy = self._strategy()
        self.allocator = dataclasses.replace(parts.allocator)  # what it learns is this run's
        self.keeps_frozen = config.train == "all"
        # What the frozen weights are, so that a run goes on beside the same ones.
        holds_on = self.keeps_frozen and not parts.loss.uses_reference
        self._base = None if holds_on else checksum(self.lm.memgen or model)
        longest = config.max_new_tokens * self.strategy.responses_per_row
        self.learner = Learner(config, self.trainable, self.sampling(), longest)
        self.progressed = Progressed()
        self._began: Any = None

    def _memory(self) -> tuple[MemGenConfig, np.ndarray | None]:
        """The config of latent memory, and where it may be written."""
        config, woven = self.config, self.lm.memgen
        if config.train in ("all", "lora"):
            if woven is not None:
                raise ValueError(
                    f"{config.weights} holds a weaver, which train={config.train!r} would drop: "
                    "choose weaver or trigger, or the weights that it was trained beside"
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

    def _strategy(self) -> RolloutStrategy:
        """The strategy of this run, which must fit its task."""
        config = self.config
        episodic = hasattr(self.task, "step")
        strategy = config.parts.strategy or (Turns() if episodic else OneResponse())
        if strategy.episodic != episodic:
            kind, word = ("an environment", "turns") if episodic else ("a task", "one_response")
            raise ValueError(
                f"strategy {strategy.word} does not fit {self.task.name}, which is {kind}: leave "
                f"strategy out, or choose one such as {word}"
            )
        for shaping in config.parts.reward:
            if shaping.one_response and episodic:
                raise ValueError(
                    f"reward {shaping.word} is for tasks of one response, {self.task.name} has "
                    "turns: leave it out"
                )
        return strategy.for_run(PromptFormatter(self.lm, config.chat), config)

    def sampling(self, greedy: bool = False) -> Sampling:
        """How rollouts are sampled; `greedy` for held-out problems. A trigger is always sampled:
        so it is trained."""
        memory: Any = memgen.NeverInvoke()
        if self.config.train == "weaver":
            memory = memgen.AlwaysInvoke()
        elif self.config.train == "trigger":
            memory = memgen.LearnedInvoke(1.0, sample=True)
        tokenizer = self.lm.tokenizer
        temperature = 0.0 if greedy else self.config.temperature
        return Sampling(temperature, tokenizer.vocab_size, self.lm.stop_ids, memory)

    def first_state(self) -> TrainState:
        """The weights as they are, and what is new beside them."""
        return self.trainable.start(self._first_weights())

    def _first_weights(self) -> Any:
        """In arrays of their own: training overwrites them, and the writer may be used again."""
        policy = self._around(self.lm.model)
        if self.lm.memgen is not None and policy.memgen is not None:
            policy.memgen = nnx.data(trained_before(self.lm.memgen, policy.memgen))
        return jax.tree.map(lambda leaf: leaf.copy(), nnx.state(policy))

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint holds besides arrays."""
        return {
            "config": as_json(self.config),
            "data_fingerprint": self._fingerprint,
            "tokenizer": self.lm.tokenizer.to_json(),
            "base": self._base,
            "resolved": resolved(self.trainable),
            "model": as_json(self.trainable.config),
            "rl": dataclasses.asdict(self.progressed),
            **tokenizer_meta(self.lm.tokenizer),
        }

    def restore(self, meta: dict[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""
        self.progressed = Progressed(**meta["rl"])
        self.allocator.restore(self.progressed.allocator)
        self.strategy.restore(self.progressed.strategy)

    def sampler(self, weights: Any, greedy: bool = False) -> Sampler:
        policy: MemGen = sampler_of(self.trainable.model(weights))
        return Sampler(policy, self.sampling(greedy), self.config.max_rows, self.trainable.mesh)

    def problems(self, split: Split, start: int, count: int) -> list[Problem]:
        """`count` problems from a position on; a list of them is shuffled anew each time it is
        gone through."""
        size = self.task.sizes[split]
        if size is None:
            return [self.task.problem(split, start + offset) for offset in range(count)]
        found = []
        for place in range(start, start + count):
            epoch, index = divmod(place, size)
            order = np.random.default_rng([self.config.seed, epoch]).permutation(size)
            found.append(self.task.problem(split, int(order[index])))
        return found

    def collect(self, weights: Any) -> Collected:
        """The rollouts of one step; what they are drawn from moves on."""
        config, sampler = self.config, self.sampler(weights)
        filtering = config.recipe.filter_groups
        kept: list[Trajectory] = []
        drawn: list[Trajectory] = []
        groups = found = 0
        for _ in range(config.max_batches if filtering else 1):
            position = self.progressed.position
            problems = self.problems("train", position, config.batch_size)
            counts = self._planned([problem.uid for problem in problems])
            rows = self.strategy.collect(
                sampler, self.task, problems, counts, (config.seed, position)
            )
            self.progressed.position += len(problems)
            self._observe(problems, rows)
            rows = [dataclasses.replace(row, group=groups + row.group) for row in rows]
            groups += len(problems)
            drawn += rows
            usable = mixed_groups(rows) if filtering else list(range(groups))
            usable = usable[: config.batch_size - found]
            found += len(usable)
            kept += [row for row in rows if row.group in set(usable)]
            if found >= config.batch_size:
                break
        return Collected(kept, drawn, groups, found)

    def _planned(self, uids: list[str]) -> list[int]:
        total = self.config.batch_size * self.config.num_generations
        counts = self.allocator.plan(uids, total)
        if len(counts) != len(uids) or min(counts) < 0 or sum(counts) != total:
            raise ValueError(
                f"{type(self.allocator).__name__}.plan gave {sum(counts)} rollouts to "
                f"{len(counts)} problems, the budget is {total} for {len(uids)}: plan all of it, "
                "none below 0"
            )
        return list(counts)

    def _observe(self, problems: Sequence[Problem], rows: Sequence[Trajectory]) -> None:
        episodes = Episodes.of(rows)
        for group, problem in enumerate(problems):
            successes = episodes.success[episodes.group == group]
            self.allocator.observe(problem.uid, successes.tolist())
        self.progressed.allocator = self.allocator.state
        self.progressed.strategy = self.strategy.state

    def step(self, state: TrainState) -> tuple[TrainState, dict[str, float], Collected]:
        """Collect, credit, update; metrics by name."""
        config, begin = self.config, time.perf_counter()
        collected = self.collect(state.weights)
        sampled = time.perf_counter()
        metrics = rollout_metrics(collected)
        if collected.trajectories:
            advantages = assign_advantages(
                collected.trajectories, Episodes.of(collected.trajectories), config
            )
            rows = make_rows(
                collected.trajectories, advantages, self._multiple, self._events_of_a_row()
            )
            rng = np.random.default_rng([config.seed, self.progressed.step])
            state, learned = self.learner.update(state, rows, rng, self._reference())
            metrics |= learning_metrics(learned)
        self.progressed.step += 1
        end = time.perf_counter()
        written = sum(row.written for row in collected.trajectories)
        metrics |= {
            "rollout_seconds": sampled - begin,
            "update_seconds": end - sampled,
            "rollout_tokens_per_second": collected.written / (sampled - begin),
            "update_tokens_per_second": written * config.epochs / (end - sampled),
        }
        return state, metrics, collected

    def _reference(self) -> Any:
        """Trained parameters as they began, where the method's KL holds on to them."""
        if self.config.parts.loss.uses_reference and self._began is None:
            weights = jax.device_put(self._first_weights(), self.trainable.shardings.weights)
            self._began = self.trainable.abstract.with_weights(weights).params
        return self._began

    def _events_of_a_row(self) -> int:
        if self.config.train in ("all", "lora"):
            return 0
        return self.strategy.responses_per_row * self.memgen.events

    def evaluate(self, weights: Any) -> tuple[dict[str, float], list[Trajectory]]:
        """Held-out problems, one response or episode each, the most probable tokens."""
        size, wanted = self.task.sizes["test"], self.config.evaluation.rows
        count = min(wanted or size or ENDLESS, size or wanted or ENDLESS)
        problems = self.problems("test", 0, count)
        rows = self.strategy.collect(
            self.sampler(weights, greedy=True), self.task, problems, [1] * len(problems),
            (self.config.seed, 1),
        )  # fmt: skip
        episodes = Episodes.of(rows)
        rate = float(episodes.success.mean())
        found = {
            "success": rate,
            "standard_error": standard_error(episodes, rows),
            "reward": float(episodes.reward.mean()),
            "length": float(episodes.length.mean()),
            **invocations(rows, len(episodes.rows)),
        }
        return found, rows

    def describe(self) -> str:
        """One line for the start of a run."""
        config, trainable = self.config, self.trainable
        sizes = " x ".join(f"{name} {size}" for name, size in trainable.mesh.shape.items())
        return (
            f"{config.weights}: {trainable.config.num_params():,} parameters, trained are "
            f"{trainable.num_trained:,} ({config.train}); {config.recipe.word} on "
            f"{self.task.name}, {config.batch_size} problems x {config.num_generations} rollouts x "
            f"{config.updates} updates a step; {sizes}"
        )


def fingerprint(task: Any) -> str:
    """The name of a task, and a hash of its problems, or of the first ones of an endless one."""
    found = hashlib.blake2b(digest_size=8)
    for split in ("train", "test"):
        size = task.sizes[split]
        for index in range(FEW if size is None else size):
            problem = task.problem(split, index)
            found.update(f"{problem.prompt}\0{problem.answer}\0".encode())
    return f"{task.name} {found.hexdigest()}"
