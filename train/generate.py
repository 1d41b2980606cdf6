"""Text from a model: python -m train.generate --checkpoint runs/tiny --prompt "def "

A pretrained one answers: python -m train.generate --model smollm2 --chat --prompt "Who are you?"
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

import memgen
from memgen import MemGen
from thoughtbubbles import Backbone
from thoughtbubbles.bubbles import BubbleMap, bubble_map
from thoughtbubbles.decoding import generate
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.cli.command import run_command
from train.cli.figures import check_figure
from train.data.chat_templates import chat_ids
from train.evaluation.policy_overrides import AnyPolicy, turn
from train.models.load import Writer, load_named

MEMORY = {
    "always": memgen.AlwaysInvoke(),
    "never": memgen.NeverInvoke(),
    "learned": memgen.LearnedInvoke(),
}


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
    policy: AnyPolicy | None = None
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


def write(loaded: Writer, prompts: list[str], max_new_tokens: int, **options: Any) -> list[str]:
    """Each prompt with its continuation; the options are those of `generate`."""
    ids = [loaded.prompt(prompt) for prompt in prompts]
    new = _continue(loaded, ids, max_new_tokens, options)
    return [loaded.tokenizer.decode(old + added) for old, added in zip(ids, new, strict=True)]


def answer(loaded: Writer, prompts: list[str], max_new_tokens: int, **options: Any) -> list[str]:
    """The model's answer to each prompt, a message of its own; options are those of `generate`."""
    tokenizer = loaded.tokenizer
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise ValueError("--chat needs a model with a chat template, e.g. --model smollm2")
    ids = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
    new = _continue(loaded, ids, max_new_tokens, options)
    return [loaded.tokenizer.decode(added).strip() for added in new]


def _continue(
    loaded: Writer, ids: list[list[int]], max_new_tokens: int, options: dict[str, Any]
) -> list[list[int]]:
    longest, trained = max(map(len, ids)) + max_new_tokens, loaded.context_length
    if trained is not None and longest > trained:
        print(f"note: up to {longest} tokens, trained on {trained} at a time", file=sys.stderr)
    choices = loaded.tokenizer.vocab_size
    if loaded.memgen is not None:
        options |= {"stop": loaded.ends, "choices": choices}
        return _remember(loaded.memgen, ids, max_new_tokens, **options)
    return generate(loaded.model, ids, max_new_tokens, stop=loaded.ends, choices=choices, **options)


def _remember(
    model: MemGen,
    ids: list[list[int]],
    max_new_tokens: int,
    *,
    memory: str = "always",
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    **options: Any,
) -> list[list[int]]:
    """Continue with latent memory; says where it was written."""
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    if names := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{names[0]} is not offered with latent memory: leave it out")
    response = memgen.generate(model, ids, max_new_tokens, policy=MEMORY[memory], **options)
    for row, points in enumerate(np.asarray(response.points)):
        places = ", ".join(str(point) for point in points[points >= 0]) or "none"
        print(f"text {row}: memory before new tokens {places}", file=sys.stderr)
    return response.texts


def map_of_text(loaded: Writer, text: str) -> BubbleMap:
    """Bubbles of a text, read as one block behind the separator (which the map leaves out)."""
    ids = [loaded.tokenizer.separator, *loaded.tokenizer.encode(text)[0].tolist()]
    tokens = ["", *(loaded.tokenizer.decode([token]) for token in ids[1:])]
    found = bubble_map(loaded.model, ids, tokens)
    return dataclasses.replace(
        found, streams=found.streams[:, 1:], score=found.score[:, 1:], tokens=found.tokens[1:]
    )


if __name__ == "__main__":
    run_command(main, GenerateConfig)
