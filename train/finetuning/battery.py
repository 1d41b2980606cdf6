"""The battery: success and validity of a model on the variants of an environment.

A model that was tuned on one prompt may answer without reading the prompt (arXiv 2510.00237). A
model of this kind fails in variants whose prompts give other names, and succeeds in the fake
variants, whose prompts give other names but whose rules follow the old names. The first measure to
fall is the model's validity, the fraction of answers that the prompt allows at all.
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

_LONGEST_PROMPT = 10_000  # maximum tokens of an observation, large so that none is truncated


@dataclasses.dataclass(frozen=True)
class BatteryConfig:
    """Config of a battery: an environment, its variants, and limits on the episodes.

    Attributes:
        task: Environment that has variants, with its options in brackets, e.g.
            "sokoban_variants(held_out=40)" or "general_points"; with "" no episodes are played.
        variants: Names of the variants to play; by default all variants that the environment's
            options allow.
        episodes: Number of held-out problems of each variant.
        max_turns: Maximum number of turns of an episode; by default the environment's maximum. One
            turn is enough to measure validity.
        max_new_tokens: Maximum number of tokens per response; responses with thoughts need many.
            The fraction of responses truncated at this limit is reported as `cut`.
        chat: Whether prompts are user messages in the model's chat template, as `sft` renders
            conversations; by default, True if the model's tokenizer has a template.
        max_rows: Maximum number of responses that are generated in parallel.
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
        """Make the environment in each variant, with the whole prompt in every observation.

        Returns:
            Mapping from the name of a variant to its environment.

        Raises:
            ValueError: The environment or a variant is unknown, or the environment has no variants.
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
    """Scores of a model on one variant, averaged over episodes.

    Attributes:
        success: Fraction of episodes that were solved.
        error: Standard error of `success`.
        validity: Fraction of an episode's answers that the prompt allows, averaged over episodes.
        turns: Mean number of turns of an episode.
        cut: Fraction of the responses of all turns that were truncated at `max_new_tokens`.
    """

    success: float
    error: float
    validity: float
    turns: float
    cut: float


def instructed(spec: str, seed: int) -> InstructedEnvironment:
    """Make an environment by name, and check that the environment has variants of its prompt.

    Args:
        spec: Name of the environment with its options in brackets.
        seed: Seed of the order of problems.

    Raises:
        ValueError: The environment is unknown, or has no variants.
    """
    environment: Any = make_task(spec, seed)
    if not isinstance(environment, InstructedEnvironment):
        raise ValueError(
            f"task {environment.name} has no variants of its prompt: choose sokoban_variants or "
            "general_points"
        )
    return environment


def formatter_for(lm: LanguageModel, config: BatteryConfig) -> PromptFormatter:
    """Make the formatter of prompts, with a chat template if `BatteryConfig.chat` requires it."""
    return PromptFormatter(lm, has_chat_template(lm) if config.chat is None else config.chat)


def play_battery(
    policy: MemGen,
    lm: LanguageModel,
    config: BatteryConfig,
    mesh: Mesh,
    split: Split = "test",
) -> dict[str, VariantScore]:
    """Play episodes of each variant with a policy that decodes greedily.

    In each turn, the policy's context is only the current prompt, without earlier turns.

    Args:
        policy: Policy to sample from (`train.rl.learning.policy.sampler_of`).
        lm: Language model whose tokenizer is used.
        config: Variants and limits.
        mesh: Mesh over which the rows are sharded.
        split: Split of the problems; comparing the scores on "train" with the scores on "test"
            shows how much is memorised.

    Returns:
        Mapping from the name of a variant to its scores.

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
    """Convert scores to metrics `battery/VARIANT/success`, `.../validity` and `.../cut`."""
    return {
        f"battery/{name}/{measure}": getattr(score, measure)
        for name, score in scores.items()
        for measure in ("success", "validity", "cut")
    }


def readable_battery(held_out: Mapping[str, float]) -> str:
    """Format the success and validity of each variant, for the line of held-out metrics.

    If responses were truncated, the text gives the largest truncated fraction of any variant, since
    truncation lowers success and validity.

    Args:
        held_out: Mapping from names to held-out metrics, including those of `battery_metrics`.

    Returns:
        Text to append to the line of held-out metrics; "" if no battery was played.
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
