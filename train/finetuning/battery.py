"""The battery: success and validity of a model on the variants of an environment.

A model that was tuned on one prompt may answer without reading it (arXiv 2510.00237): then it fails
where the prompt gives other names, and succeeds in the fake variants, which show other names and
count the old ones. Its validity, the share of answers that the prompt allows at all, falls first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

import memgen
from memgen import MemGen
from train.models.load import LanguageModel
from train.rl.environments.instructed import InstructedEnvironment
from train.rl.learning.policy import NO_MEMORY
from train.rl.named_tasks import make_task
from train.rl.rollout.formatter import PromptFormatter, has_chat_template
from train.rl.rollout.sampler import Sampler, Sampling
from train.rl.rollout.strategies import Turns
from train.rl.types import Episodes, Split, Trajectory

_LONGEST_PROMPT = 10_000  # tokens of an observation, none of which is cut


@dataclasses.dataclass(frozen=True)
class BatteryConfig:
    """Variants of an environment that a model is scored on.

    Attributes:
        task: Environment with variants and its options, e.g. "sokoban_variants(held_out=40)" or
            "general_points"; without one nothing is played.
        variants: Variants by name; the default is all that the environment's options allow.
        episodes: Number of held-out problems of each variant.
        max_turns: Number of turns after which an episode is cut; the default is the environment's.
            One turn is enough for validity.
        max_new_tokens: Longest response, in tokens; thoughts need many. The share of responses that
            were cut there is `cut`.
        chat: Whether prompts are messages to the model, in its chat template; the default is yes
            where its tokenizer has one, as `sft` renders conversations.
        max_rows: Greatest number of responses that are generated at a time.
        seed: Seed of the order of problems.
    """

    task: str = ""
    variants: tuple[str, ...] = ()
    episodes: int = 100
    max_turns: int | None = None
    max_new_tokens: int = 256
    chat: bool | None = None
    max_rows: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("episodes", "max_new_tokens", "max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more")
        if self.max_turns is not None and self.max_turns < 1:
            raise ValueError(f"max_turns={self.max_turns}: choose 1 or more, or leave it out")

    def environments(self) -> dict[str, InstructedEnvironment]:
        """The environment in each variant, whose observations are whole prompts.

        Raises:
            ValueError: There is no such environment or variant.
        """
        environment = instructed(self.task, self.seed)
        known = environment.variants
        for name in self.variants:
            if name not in known:
                raise ValueError(
                    f"battery: unknown variant {name!r} of {environment.word}: choose from "
                    f"{', '.join(known)}"
                )
        names = self.variants or [
            name for name, each in known.items() if environment.held_out or not each.held_out
        ]
        change = lambda name: dataclasses.replace(environment, variant=name, restate=True)  # noqa: E731
        return {name: change(name) for name in names}


@dataclasses.dataclass(frozen=True)
class VariantScore:
    """Means over the episodes of a variant.

    Attributes:
        success: Share of episodes that were solved.
        error: Standard error of that share.
        validity: Mean share of an episode's answers that its prompts allowed.
        turns: Mean number of turns.
        cut: Share of responses, over all turns, that were cut at the limit of their length.
    """

    success: float
    error: float
    validity: float
    turns: float
    cut: float


def instructed(spec: str, seed: int) -> InstructedEnvironment:
    """The environment with variants that a text asks for.

    Args:
        spec: Name, with options in brackets.
        seed: Seed of the order of problems.

    Raises:
        ValueError: There is no such environment, or it has no variants.
    """
    environment: Any = make_task(spec, seed)
    if not isinstance(environment, InstructedEnvironment):
        raise ValueError(
            f"task {environment.name} has no variants of its prompt: choose sokoban_variants or "
            "general_points"
        )
    return environment


def formatter_for(lm: LanguageModel, config: BatteryConfig) -> PromptFormatter:
    """Formatter of prompts as messages, if the config says so, or leaves it to the tokenizer."""
    return PromptFormatter(lm, has_chat_template(lm) if config.chat is None else config.chat)


def play_battery(
    policy: MemGen,
    lm: LanguageModel,
    config: BatteryConfig,
    mesh: Mesh,
    split: Split = "test",
) -> dict[str, VariantScore]:
    """Scores of a policy on each variant, its answers greedy, each to the present prompt alone.

    Args:
        policy: Policy to sample from (`train.rl.learning.policy.sampler_of`).
        lm: Language model whose tokenizer is used.
        config: Variants and limits.
        mesh: Mesh whose devices share the rows.
        split: Split of the problems; those of training tell what was memorised from what is found.

    Raises:
        ValueError: The config or an environment has a mistake.
    """
    plain = policy.config == NO_MEMORY
    memory: Any = memgen.NeverInvoke() if plain else memgen.AlwaysInvoke()
    sampling = Sampling(0.0, lm.tokenizer.vocab_size, lm.stop_ids, memory)
    sampler = Sampler(policy, sampling, config.max_rows, mesh)
    turns = Turns(
        max_turns=config.max_turns,
        max_observation=_LONGEST_PROMPT,
        keep_context=False,
        history=False,
        formatter=formatter_for(lm, config),
        max_new_tokens=config.max_new_tokens,
    )
    found = {}
    for name, environment in config.environments().items():
        problems = [environment.problem(split, index) for index in range(config.episodes)]
        strategy = turns.for_task(environment)
        counts = [1] * len(problems)
        found[name] = _score(
            strategy.collect(sampler, environment, problems, counts, (config.seed,))
        )
    return found


def _score(rows: list[Trajectory]) -> VariantScore:
    episodes = Episodes.from_trajectories(rows)
    first = [rows[mine[0]] for mine in episodes.rows]
    success = episodes.success.astype(float)
    return VariantScore(
        float(success.mean()),
        float(success.std() / np.sqrt(len(success))),
        float(np.mean([row.reward.info.get("validity", 0.0) for row in first])),
        float(np.mean([len(row.turn_rewards) for row in first])),
        float(np.mean([not row.finished for row in rows])),
    )


def battery_metrics(scores: Mapping[str, VariantScore]) -> dict[str, float]:
    """`battery/VARIANT/success`, `battery/VARIANT/validity` and `battery/VARIANT/cut`."""
    return {
        f"battery/{name}/{measure}": getattr(score, measure)
        for name, score in scores.items()
        for measure in ("success", "validity", "cut")
    }


def readable_battery(held_out: Mapping[str, float]) -> str:
    """Success and validity of each variant in held-out metrics, for a line of progress.

    Where any response was cut it says how many, which success and validity hang on.
    """
    names = [name.split("/")[1] for name in held_out if name.endswith("/validity")]
    shown = [
        f"{name} {held_out[f'battery/{name}/success']:.2f}/"
        f"{held_out[f'battery/{name}/validity']:.2f}"
        for name in names
    ]
    cut = max((held_out[f"battery/{name}/cut"] for name in names), default=0)
    note = f" (up to {cut:.0%} of responses cut at max_new_tokens)" if cut else ""
    return f"; success/validity: {', '.join(shown)}{note}" if shown else ""
