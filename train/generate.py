"""Text from a model: python -m train.generate --checkpoint runs/tiny --prompt "def "

A pretrained one answers: python -m train.generate --model smollm2 --chat --prompt "Who are you?"
"""

import dataclasses
from pathlib import Path
from typing import Literal

from thoughtbubbles import Backbone, Policy
from train.cli.command import run_command
from train.cli.figures import check_figure
from train.evaluation.policy_overrides import turn
from train.models.generation import answer, map_of_text, write
from train.models.load import Writer, load_named


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model, or a pretrained one.

    Attributes:
        checkpoint: run folder, or one step's folder in it.
        model: in place of a checkpoint, "smollm2", a Hugging Face folder, or a .gguf file.
        chat: the prompts are messages to the model, and only its answers are printed.
        prompt: one or more; each is continued as if it were alone.
        max_new_tokens: at most this many; a text also ends at the document separator.
        temperature: 0 takes the most probable token each time.
        top_k: sample from this many most probable tokens.
        top_p: from the fewest most probable ones that make up this much probability.
        min_p: from those at least this many times as probable as the most probable one.
        seed: of the samples.
        policy: in place of the model's own, e.g. "PrefixRank(ratio=2.0)".
        ratio, window, threshold_offset: change this in the policy: more thinking, or less.
        memory: of a model with a weaver: "always" weave where it may, "never", or "learned".
        cache: keep keys and values where the policy is causal; else recompute the prefix each time.
        bubbles: also print where the model forks in the text.
        figure: also save the bubble map of the first text to this file (needs matplotlib).
    """

    checkpoint: str | None = None
    model: str | None = None
    chat: bool = False
    prompt: tuple[str, ...] = ("",)
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    policy: Policy | None = None
    ratio: float | None = None
    window: int | None = None
    threshold_offset: float | None = None
    memory: Literal["always", "never", "learned"] = "always"
    cache: bool = True
    bubbles: bool = False
    figure: str | None = None


def main(config: GenerateConfig) -> None:
    if config.chat and (config.bubbles or config.figure):
        raise ValueError("--chat prints answers alone: leave out --bubbles and --figure")
    if config.figure:
        check_figure(Path(config.figure))
    loaded = under_policy(load_named(config.checkpoint, config.model), config)
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
        map_of_text(loaded, texts[0]).figure().savefig(config.figure, dpi=150)
        print(f"bubble map: {Path(config.figure).absolute()}")


def under_policy(loaded: Writer, config: GenerateConfig) -> Writer:
    """The model with the policy and dials that were asked for."""
    dials = (config.ratio, config.window, config.threshold_offset)
    if config.policy is None and all(dial is None for dial in dials):
        return loaded
    if not loaded.model.config.fork_layers:
        name = config.checkpoint or config.model
        raise ValueError(f"{name} is a plain decoder: it has no policy to change")
    model = loaded.model.with_policy(turn(config.policy or loaded.model.config.policy, *dials))
    memory = loaded.memgen and loaded.memgen.with_reasoner(Backbone(model))
    return dataclasses.replace(loaded, model=model, memgen=memory)


def command() -> None:
    run_command(main, GenerateConfig)


if __name__ == "__main__":
    command()
