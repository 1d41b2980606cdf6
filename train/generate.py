"""Text from a checkpoint: python -m train.generate --checkpoint runs/tiny --prompt "def "."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

from thoughtbubbles.bubbles import BubbleMap, bubble_map
from thoughtbubbles.decoding import generate
from train.command import run_command
from train.load import Loaded, load_model


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model.

    Attributes:
        checkpoint: run folder, or one step's folder in it.
        prompt: one or more; each is continued as if it were alone.
        max_new_tokens: at most this many; a text also ends at the document separator.
        temperature: 0 takes the most probable token each time.
        seed: of the samples.
        bubbles: also print where the model forks in the text.
        figure: also save the bubble map of the first text to this file (needs matplotlib).
    """

    checkpoint: str
    prompt: tuple[str, ...] = ("",)
    max_new_tokens: int = 128
    temperature: float = 0.8
    seed: int = 0
    bubbles: bool = False
    figure: str | None = None


def main(config: GenerateConfig) -> None:
    if config.figure:
        check_figure(Path(config.figure))
    loaded = load_model(config.checkpoint)
    texts = write(
        loaded, list(config.prompt), config.max_new_tokens, config.temperature, config.seed
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


def check_figure(path: Path) -> None:
    """Raise before any work is done if a figure could not be saved there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('a figure needs matplotlib: pip install "thoughtbubbles[notebooks]"')
    if not path.absolute().parent.is_dir():
        raise ValueError(f"figure {path}: its folder does not exist, make it or choose another")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"figure {path}: choose a name that ends in .png, .pdf or .svg")


def write(
    loaded: Loaded, prompts: list[str], max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """Each prompt with its continuation."""
    tokenizer = loaded.tokenizer
    ids = [[tokenizer.separator, *tokenizer.encode(prompt)[0].tolist()] for prompt in prompts]
    longest, trained = max(map(len, ids)) + max_new_tokens, loaded.config["data"]["seq_len"]
    if longest > trained:
        print(f"note: up to {longest} tokens, trained on {trained} at a time", file=sys.stderr)
    new = generate(
        loaded.model,
        ids,
        max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=[tokenizer.separator],
        choices=tokenizer.vocab_size,
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
