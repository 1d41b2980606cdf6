"""White-box reading of an organism's prompts: which tokens lenses show there (arXiv 2510.01070)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.lens import capture, mean_lens
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.audit.auditor import same_word, words_of
from train.audit.organisms import Message, Organism
from train.audit.sae import feature_scores, nearest_tokens
from train.audit.train_sae import load_sae
from train.data.chat_templates import chat_ids, render
from train.models.load import LanguageModel

ROWS = 32
"""Number of prompts that are read at once."""

READINGS = {"logit_lens": False, "embeddings": True}
"""White-box methods: probabilities by the final norm and head, or cosines to the embeddings."""


def top_tokens(
    lm: LanguageModel, organism: Organism, site: str, method: str, top: int
) -> list[list[str]]:
    """The tokens that a lens shows at the positions of each trial, from the most probable.

    Args:
        lm: Model with sites, whose tokenizer has a chat template.
        organism: What is audited; its `read_at` names the positions.
        site: Name of the site that is read.
        method: One of `READINGS`.
        top: Number of tokens.

    Returns:
        Texts of the tokens of each trial.

    Raises:
        ValueError: The tokenizer has no chat template, a prompt has none of the words to read at,
            or a secret is no token of the vocabulary.
    """
    check_vocabulary(lm, organism)
    if method not in READINGS:
        raise ValueError(f"unknown reading {method!r}: choose from {', '.join(READINGS)}")
    found: list[list[str]] = []
    prompts = [positions_of(lm, organism, trial.messages) for trial in organism.trials]
    width = max(len(ids) for ids, _ in prompts)
    for start in range(0, len(prompts), ROWS):
        tokens, mask, chosen = _rows(prompts[start : start + ROWS], width)
        model: Any = lm.model
        reading = mean_lens(
            model, tokens, chosen, mask, sites=(site,), top=top, cosine=READINGS[method]
        )[site]
        for ids in np.asarray(reading.ids)[: len(prompts) - start]:
            found.append([lm.tokenizer.decode([token]) for token in ids if _known(lm, token)])
    return found


def sae_tokens(
    lm: LanguageModel, organism: Organism, folder: str, features: int = 10, top: int = 20
) -> list[list[str]]:
    """Tokens of the features that say what the positions of each trial are about.

    Features are ordered by their mean activation times log(1 / density); each gives the tokens
    whose embeddings have the greatest product with its decoder row.

    Args:
        lm: Model with sites, whose tokenizer has a chat template.
        organism: What is audited; its `read_at` names the positions.
        folder: Folder of an autoencoder that `audit sae` trained on this model.
        features: Number of features.
        top: Number of tokens of each.

    Returns:
        Texts of the tokens of each trial, those of the first feature first.

    Raises:
        ValueError: The folder holds no autoencoder, it is of another width, or a reason of
            `top_tokens`.
    """
    check_vocabulary(lm, organism)
    sae, density, meta = load_sae(folder)
    prompts = [positions_of(lm, organism, trial.messages) for trial in organism.trials]
    width = max(len(ids) for ids, _ in prompts)
    model: Any = lm.model
    table = model.embed_tokens(jnp.arange(model.vocab_size))
    found: list[list[str]] = []
    for start in range(0, len(prompts), ROWS):
        tokens, mask, chosen = _rows(prompts[start : start + ROWS], width)
        at = capture(model, tokens, mask, sites=(meta["site"],))[1][meta["site"]]
        value, index = map(np.asarray, sae.features(at.x))
        here = np.asarray(at.alive & jnp.take_along_axis(chosen, at.token, axis=1))
        for row in range(min(ROWS, len(prompts) - start)):
            mean = np.zeros(len(density), np.float32)
            np.add.at(mean, index[row][here[row]], value[row][here[row]] / here[row].sum())
            score = np.asarray(feature_scores(jnp.asarray(mean), jnp.asarray(density)))
            best = np.argsort(-score, kind="stable")[:features]
            ids = np.asarray(nearest_tokens(sae, table, jnp.asarray(best), top)).ravel()
            found.append([lm.tokenizer.decode([token]) for token in ids if _known(lm, token)])
    return found


def positions_of(
    lm: LanguageModel, organism: Organism, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Token ids of a prompt, and whether a white-box method reads at each of them.

    Args:
        lm: Model whose tokenizer has a chat template.
        organism: What is audited. Without words to read at, the control tokens that open the
            answer are read.
        messages: Messages of the prompt.

    Raises:
        ValueError: The tokenizer has no chat template, or the prompt has none of the words.
    """
    tokenizer = lm.tokenizer
    if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer.name} has no chat template: audit a model that has one")
    ids = chat_ids(tokenizer, messages)
    if organism.read_at:
        here = [tokenizer.decode([token]).strip().lower() in organism.read_at for token in ids]
        if not any(here):
            said = messages[-1]["content"][:60]
            raise ValueError(
                f"organism {organism.name}: the prompt {said!r} has no token of read_at "
                f"({', '.join(organism.read_at)}): change one of them"
            )
        return ids, here
    text = render(
        tokenizer.chat_template,
        messages,
        bos_token=tokenizer.bos,
        eos_token=tokenizer.eos,
        add_generation_prompt=False,
    )
    before = tokenizer.rendered(text)
    start = next((i for i, pair in enumerate(zip(ids, before, strict=False)) if pair[0] != pair[1]),
                 min(len(ids), len(before)))  # fmt: skip
    start = min(start, len(ids) - 1)  # a template without a generation prompt: the last token
    return ids, [index >= start for index in range(len(ids))]


def check_vocabulary(lm: LanguageModel, organism: Organism) -> None:
    """Raise a ValueError unless each secret begins with a token, which a lens could show.

    Args:
        lm: Model that is read.
        organism: What is audited.
    """
    for secret in dict.fromkeys(trial.secret for trial in organism.trials):
        word = words_of(secret)[0]
        forms = (word, f" {word}", word.capitalize(), f" {word.capitalize()}")
        if not any(_is_one_token(lm, form, word) for form in forms):
            raise ValueError(
                f"the secret {secret!r} is no token of {lm.tokenizer.name}, so no lens can show "
                "it: choose another word, or leave the white-box methods out"
            )


def _is_one_token(lm: LanguageModel, text: str, word: str) -> bool:
    ids = lm.tokenizer.encode(text)[0].tolist()
    return len(ids) == 1 and same_word(lm.tokenizer.decode(ids).strip(), word)


def _known(lm: LanguageModel, token: int) -> bool:
    return 0 <= token < lm.tokenizer.vocab_size


def _rows(
    prompts: Sequence[tuple[list[int], list[bool]]], width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts as `ROWS` padded rows of a power of two, so that they share a program."""
    width = max(16, 1 << (width - 1).bit_length())
    tokens = np.zeros((ROWS, width), np.int32)
    mask, chosen = np.zeros((ROWS, width), bool), np.zeros((ROWS, width), bool)
    for row, (ids, here) in enumerate(prompts):
        tokens[row, : len(ids)], mask[row, : len(ids)], chosen[row, : len(ids)] = ids, True, here
    mask[len(prompts) :, 0] = True  # rows of padding, which are left out afterwards
    return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(chosen)
