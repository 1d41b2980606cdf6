"""Generate text with a model: python -m train.generate --checkpoint runs/tiny --prompt "def "

Chat with a model: python -m train.generate --model smollm2 --chat --prompt "Who are you?"
"""

import dataclasses
from pathlib import Path
from typing import Literal

from thoughtbubbles.sampling import check_sampling
from train.cli.command import run_command
from train.cli.figures import check_figure
from train.cli.numbers import check_least
from train.evaluation.model_options import ModelOptions
from train.models.generation import answer, map_of_text, write
from train.models.load import LanguageModel, load_named


@dataclasses.dataclass(frozen=True)
class GenerateConfig(ModelOptions):
    """Continue prompts with a trained model, or a pretrained one.

    Attributes:
        chat: Whether to render each prompt as a user message in the model's chat template, and to
            print only the answers.
        prompt: One or more prompts, which are continued independently of each other.
        max_new_tokens: Maximum number of tokens added to each prompt; a text also ends at a stop
            token, such as the document separator.
        temperature: Sampling temperature; 0 decodes greedily.
        top_k: Number of most probable tokens to sample from; all tokens by default.
        top_p: Probability mass of the most probable tokens to sample from (nucleus sampling); 1 by
            default.
        min_p: Minimum probability of a token to sample, relative to that of the most probable
            token; 0 by default.
        seed: Seed of the samples.
        memory: Where a model with a weaver writes latent memory: "always" at every allowed
            boundary, "never", or "learned" where the model's trained trigger decides.
        cache: Whether to cache keys and values if the policy is causal; without a cache, the whole
            prefix is recomputed for each token.
        bubbles: Whether to print the bubble map of each text, which shows where the model forks.
        figure: Image file for the bubble map of the first text, as .png, .pdf or .svg (needs
            matplotlib).
    """

    chat: bool = False
    prompt: tuple[str, ...] = ("",)
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    memory: Literal["always", "never", "learned"] = "always"
    cache: bool = True
    bubbles: bool = False
    figure: str | None = None

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        super().__post_init__()
        check_least(self, max_new_tokens=1)
        if not self.prompt:
            raise ValueError("no prompt is given: write --prompt TEXT, or leave --prompt out")


def main(config: GenerateConfig) -> None:
    if config.chat and (config.bubbles or config.figure):
        raise ValueError("--chat prints answers alone: leave out --bubbles and --figure")
    if config.figure:
        check_figure(Path(config.figure))
    loaded = config.changed(load_named(config.checkpoint, config.model))
    loaded = under_policy(loaded, config)
    rows = len(config.prompt) if config.cache and loaded.model.cacheable else None
    loaded = loaded.for_inference(rows)
    compose = answer if config.chat else write
    how = {"cached": None if config.cache else False}
    if loaded.memgen is not None:
        if not config.cache:
            raise ValueError("--no-cache is not offered with latent memory: leave it out")
        how = {"memory": config.memory}
    elif config.memory != "always":
        name = config.checkpoint or config.model
        raise ValueError(f"--memory {config.memory}: {name} has no weaver: leave it out")
    texts = compose(
        loaded,
        list(config.prompt),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=config.seed,
        **how,
    )
    for index, text in enumerate(texts):
        if index:
            print("-" * 20)
        print(text)
        if config.bubbles:
            print("\n" + map_of_text(loaded, text).text())
    if config.figure:
        title = f"{config.checkpoint or config.model}, {loaded.model.fork_policy or 'no forks'}"
        map_of_text(loaded, texts[0]).figure(title).savefig(config.figure, dpi=150)
        print(f"bubble map: {Path(config.figure).absolute()}")


def under_policy(loaded: LanguageModel, config: GenerateConfig) -> LanguageModel:
    """Return the model with the config's fork policy and policy overrides.

    Raises:
        ValueError: The model is a plain decoder, the policy lacks an option that is overridden, or
            a value is out of range.
    """
    if not config.overrides:
        return loaded
    model = loaded.model.with_policy(config.overridden(loaded.model.fork_policy))
    memory = loaded.memgen and loaded.memgen.with_reasoner(model.backbone())
    return dataclasses.replace(loaded, model=model, memgen=memory)


def command() -> None:
    run_command(main, GenerateConfig)


if __name__ == "__main__":
    command()
