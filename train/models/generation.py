"""Generate continuations and chat answers with a model, and map the bubbles of a text."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

import memgen
from memgen import MemGen
from memgen.decoding import LONGEST_WHOLE
from thoughtbubbles import Thoughtbubbles
from thoughtbubbles.bubbles import BubbleMap, bubble_map
from thoughtbubbles.decoding import generate
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data.chat_templates import chat_ids
from train.models.load import LanguageModel
from train.models.text_memory import check_text_memory, memory_errors

MEMORY = {
    "always": memgen.AlwaysInvoke(),
    "never": memgen.NeverInvoke(),
    "learned": memgen.LearnedInvoke(),
}
"""Mapping from name to trigger policy, which decides at which boundaries latents are written."""


def write(
    loaded: LanguageModel, prompts: list[str], max_new_tokens: int, **options: Any
) -> list[str]:
    """Generate a continuation of each prompt.

    Args:
        loaded: Model with its tokenizer.
        prompts: Texts to continue.
        max_new_tokens: Maximum number of tokens added to each prompt.
        **options: Options of `thoughtbubbles.decoding.generate`. A model with latent memory takes
            the options of `memgen.generate` instead, and `memory`, the name in `MEMORY` of the
            trigger policy.

    Returns:
        Text of each prompt with its continuation.

    Raises:
        ValueError: A prompt is not valid UTF-8, the texts don't fit into RAM or device memory, or
            an option is not available for a model with latent memory.
    """
    _check_text(prompts)
    ids = [loaded.prompt(prompt) for prompt in prompts]
    new = _continue(loaded, ids, max_new_tokens, options)
    return [loaded.tokenizer.decode(old + added) for old, added in zip(ids, new, strict=True)]


def answer(
    loaded: LanguageModel, prompts: list[str], max_new_tokens: int, **options: Any
) -> list[str]:
    """Generate an answer to each prompt with the model's chat template.

    Each prompt is the only user message of its conversation.

    Args:
        loaded: Model with its tokenizer.
        prompts: User messages, one per conversation.
        max_new_tokens: Maximum number of tokens of each answer.
        **options: Options of decoding, as in `write`.

    Returns:
        Texts of the answers, without the prompts.

    Raises:
        ValueError: The model has no chat template, or `write` would raise for these arguments.
    """
    tokenizer = loaded.tokenizer
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise ValueError("--chat needs a model with a chat template, e.g. --model smollm2")
    _check_text(prompts)
    ids = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
    new = _continue(loaded, ids, max_new_tokens, options)
    return [loaded.tokenizer.decode(added).strip() for added in new]


def _check_text(prompts: list[str]) -> None:
    """Raise a ValueError for a prompt that is not valid UTF-8, which a command line can contain."""
    for index, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            wrong = error.object[error.start]
            byte = (
                f"byte 0x{ord(wrong) - 0xDC00:x}" if "\udc80" <= wrong <= "\udcff" else repr(wrong)
            )
            raise ValueError(
                f"prompt {index} is no UTF-8 ({byte} after {error.start} characters): convert it, "
                "as with iconv -t UTF-8"
            ) from error


def _continue(
    loaded: LanguageModel, ids: list[list[int]], max_new_tokens: int, options: dict[str, Any]
) -> list[list[int]]:
    longest, trained = max(map(len, ids)) + max_new_tokens, loaded.context_length
    if trained is not None and longest > trained:
        print(
            f"note: rows of up to {longest} tokens; the model was trained on rows of {trained}",
            file=sys.stderr,
        )
    cached = options.get("cached") is not False and loaded.model.cacheable
    tokens = longest - max_new_tokens
    blocks = None if loaded.memgen is None else tokens > LONGEST_WHOLE
    check_text_memory(loaded.model, len(ids), tokens, max_new_tokens, cached, blocks)
    options |= {"stop": loaded.stop_ids, "valid_vocab_size": loaded.tokenizer.vocab_size}
    with memory_errors(loaded.model, len(ids), longest), _reading() as progress:
        options |= {"progress": progress}
        if loaded.memgen is not None:
            return _remember(loaded.memgen, ids, max_new_tokens, **options)
        return generate(loaded.model, ids, max_new_tokens, **options)


@contextlib.contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    """Context manager that shows a progress bar on a terminal during a prefill in blocks.

    Yields:
        Function of the number of prefilled tokens and the number of all tokens; updates the bar.
    """
    with tqdm(unit="token", desc="prompt", delay=1, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


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
    """Continue prompts with latent memory; print before which new tokens latents were written."""
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    if names := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{names[0]} is not offered with latent memory: leave it out")
    response = memgen.generate(model, ids, max_new_tokens, policy=MEMORY[memory], **options)
    for row, points in enumerate(np.asarray(response.points)):
        places = ", ".join(str(point) for point in points[points >= 0]) or "none"
        print(f"text {row}: memory before new tokens {places}", file=sys.stderr)
    return response.texts


def map_of_text(loaded: LanguageModel, text: str) -> BubbleMap:
    """Compute the bubble map of a text: each token's number of streams and their mean score.

    One forward pass covers a document separator and the text; the map leaves the separator out.

    Raises:
        ValueError: The model is not a `Thoughtbubbles`, or the forward pass does not fit into
            memory.
    """
    if not isinstance(loaded.model, Thoughtbubbles):
        raise ValueError(f"{type(loaded.model).__name__} has no bubbles to map")
    ids = [loaded.tokenizer.separator, *loaded.tokenizer.encode(text)[0].tolist()]
    check_text_memory(loaded.model, 1, len(ids), cached=False)
    tokens = ["", *(loaded.tokenizer.decode([token]) for token in ids[1:])]
    found = bubble_map(loaded.model, ids, tokens)
    return dataclasses.replace(
        found, streams=found.streams[:, 1:], score=found.score[:, 1:], tokens=found.tokens[1:]
    )
