"""Score a model on prompt variants of an environment: success rate and validity of answers.

thoughtbubbles battery --checkpoint runs/sft --battery.task sokoban_variants
"""

import dataclasses
import json
from pathlib import Path

import jax

from train.cli.command import run_command
from train.devices.mesh import MeshConfig, make_mesh
from train.evaluation.model_options import NamedModel
from train.evaluation.task_scores import check_output, write_results
from train.finetuning.battery import BatteryConfig, VariantScore, play_battery
from train.models.finetunable import FinetunableModel
from train.models.load import LanguageModel, check_named, load_named
from train.rl.learning.policy import sampler_of


@dataclasses.dataclass(frozen=True)
class BatteryRun(NamedModel):
    """Score a model on variants of an environment, to test whether the model follows its prompt.

    Attributes:
        battery: Environment, its variants, and limits on the episodes.
        json: JSON file for the scores; none by default.
    """

    battery: BatteryConfig = BatteryConfig(task="sokoban_variants")
    json: str | None = None

    def __post_init__(self):
        check_named(self.checkpoint, self.model)


def main(config: BatteryRun) -> None:
    """Play the battery, print a table with a row per variant, and write scores to `config.json`."""
    if config.json:
        check_output(Path(config.json))
    config.battery.environments()
    lm = config.changed(load_named(config.checkpoint, config.model))
    scores = score(lm, config.battery)
    print(table(scores))
    if config.json:
        found = {name: dataclasses.asdict(score) for name, score in scores.items()}
        options = json.loads(json.dumps(dataclasses.asdict(config)))
        write_results(Path(config.json), {"options": options, "variants": found})


def score(lm: LanguageModel, config: BatteryConfig) -> dict[str, VariantScore]:
    """Play a battery's episodes with a language model, using latent memory if the model has it.

    Returns:
        Mapping from the name of a variant to its scores.

    Raises:
        ValueError: The model's policy is not causal, or the config or an environment has a mistake.
    """
    lm.model.check_cacheable()
    policy = lm.memgen
    if policy is None:
        policy = sampler_of(FinetunableModel.whole(lm.model))
    return play_battery(policy, lm, config, make_mesh(MeshConfig(), jax.devices()[:1]))


def table(scores: dict[str, VariantScore]) -> str:
    """Format the scores of variants as a Markdown table with a row for each variant.

    The column `cut` is the fraction of responses that were truncated at `max_new_tokens`.
    """
    lines = ["| variant | success | validity | turns | cut |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {each.success:.3f} ± {each.error:.3f} | {each.validity:.3f} | "
        f"{each.turns:.2f} | {each.cut:.3f} |"
        for name, each in scores.items()
    ]
    return "\n".join(lines)


def command() -> None:
    run_command(main, BatteryRun)


if __name__ == "__main__":
    command()
