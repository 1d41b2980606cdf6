"""Text from a checkpoint: python -m train.generate --checkpoint runs/tiny --prompt "def "."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from thoughtbubbles.bubbles import BubbleMap, bubble_map
from thoughtbubbles.decoding import generate
from train.command import run_command
from train.dials import AnyPolicy, turn
from train.figures import check_figure
from train.load import Loaded, load_model


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model.

    Attributes:
        checkpoint: run folder, or one step's folder in it.
        prompt: one or more; each is continued as if it were alone.
        max_new_tokens: at most this many; a text also ends at the document separator.
        temperature: 0 takes the most probable token each time.
        top_k: sample from this many most probable tokens.
        top_p: from the fewest most probable ones that make up this much probability.
        min_p: from those at least this many times as probable as the most probable one.
        seed: of the samples.
        policy: in place of the model's own, e.g. "PrefixRank(ratio=2.0)".
        ratio, window, threshold_offset: change this in the policy: more thinking, or less.
        cache: keep keys and values where the policy is causal; else recompute the prefix each time.
        bubbles: also print where the model forks in the text.
        figure: also save the bubble map of the first text to this file (needs matplotlib).
    """

    checkpoint: str
    prompt: tuple[str, ...] = ("",)
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    policy: AnyPolicy | None = None
    ratio: float | None = None
    window: int | None = None
    threshold_offset: float | None = None
    cache: bool = True
    bubbles: bool = False
    figure: str | None = None


def main(config: GenerateConfig) -> None:
    if config.figure:
        check_figure(Path(config.figure))
    loaded = under_policy(load_model(config.checkpoint), config)
    texts = write(
        loaded,
        list(config.prompt),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=config.seed,
        cached=None if config.cache else False,
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


def under_policy(loaded: Loaded, config: GenerateConfig) -> Loaded:
    """The model with the policy and dials that were asked for."""
    dials = (config.ratio, config.window, config.threshold_offset)
    if config.policy is None and all(dial is None for dial in dials):
        return loaded
    if not loaded.model.config.fork_layers:
        raise ValueError(f"{config.checkpoint} is a plain decoder: it has no policy to change")
    policy = turn(config.policy or loaded.model.config.policy, *dials)
    return dataclasses.replace(loaded, model=loaded.model.with_policy(policy))


def write(loaded: Loaded, prompts: list[str], max_new_tokens: int, **options: Any) -> list[str]:
    """Each prompt with its continuation; the options are those of `generate`."""
    tokenizer = loaded.tokenizer
    ids = [[tokenizer.separator, *tokenizer.encode(prompt)[0].tolist()] for prompt in prompts]
    longest, trained = max(map(len, ids)) + max_new_tokens, loaded.config["data"]["seq_len"]
    if longest > trained:
        print(f"note: up to {longest} tokens, trained on {trained} at a time", file=sys.stderr)
    new = generate(
        loaded.model,
        ids,
        max_new_tokens,
        stop=[tokenizer.separator],
        choices=tokenizer.vocab_size,
        **options,
    )
    return [tokenizer.decode(old + added) for old, added in zip(ids, new, strict=True)]


def map_of_text(loaded: Loaded, text: str) -> BubbleMap:
    """Bubbles of a text, read as one block behind the separator (which the map leaves out)."""
    ids = [loaded.tokenizer.separator, *loaded.tokenizer.encode(text)[0].tolist()]
    tokens = ["", *(loaded.tokenizer.decode([token]) for token in ids[1:])]
    found = bubble_map(loaded.model, ids, tokens)
    return dataclasses.replace(
        found, streams=found.streams[:, 1:], score=found.score[:, 1:], tokens=found.tokens[1:]
    )


if __name__ == "__main__":
    run_command(main, GenerateConfig)
