"""White-box methods: tokens that a lens or an autoencoder shows in prompts (arXiv 2510.01070)."""

import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.lens import mean_lens
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from thoughtbubbles.sites import check_sited, check_sites
from train.audit.auditor import same_word, words_of
from train.audit.elicitation import chat_tokenizer
from train.audit.latents import prompts_with_latents
from train.audit.organisms import Message, Organism
from train.audit.sae import feature_scores, nearest_tokens
from train.audit.texts import activation_of
from train.audit.train_sae import load_sae, selected
from train.data.chat_templates import chat_ids, closed_ids, common
from train.models.load import LanguageModel

ROWS = 32
"""Number of prompts of a forward pass."""

READINGS = {"logit_lens": False, "embeddings": True}
"""Mapping from white-box method to whether it ranks tokens by cosine in place of probability."""


def top_tokens(
    lm: LanguageModel, organism: Organism, site: str, method: str, top: int
) -> list[list[str]]:
    """Read the top tokens of each trial's prompt by a lens, averaged over positions.

    The positions are those of `positions_of`. A model with latent memory is read at the latents
    that its weaver writes after each prompt.

    Args:
        lm: Model with sites, whose tokenizer has a chat template.
        organism: Organism that is audited, whose `read_at` selects the positions.
        site: Name of the site that is read.
        method: Key of `READINGS`.
        top: Number of top tokens, from which ids outside the tokenizer's vocabulary are left out.

    Returns:
        A list for each trial with the texts of tokens, the most probable or most similar first.

    Raises:
        ValueError: The method is unknown, the tokenizer has no chat template, a prompt has none of
            the words of `read_at`, or no token stands for a secret (see `beginnings`).
    """
    check_vocabulary(lm, organism)
    if method not in READINGS:
        raise ValueError(f"unknown reading {method!r}: choose from {', '.join(READINGS)}")
    found: list[list[str]] = []
    prompts = [positions_of(lm, organism, trial.messages) for trial in organism.trials]
    width = max(len(ids) for ids, _ in prompts)
    for start in range(0, len(prompts), ROWS):
        model, tokens, mask, chosen = _rows(lm, prompts[start : start + ROWS], width)
        reading = mean_lens(
            model, tokens, chosen, mask, sites=(site,), top=top, cosine=READINGS[method]
        )[site]
        for ids in np.asarray(reading.ids)[: len(prompts) - start]:
            found.append([lm.tokenizer.decode([token]) for token in ids if _known(lm, token)])
    return found


def sae_tokens(
    lm: LanguageModel, organism: Organism, folder: str, features: int = 10, top: int = 20
) -> list[list[str]]:
    """Find tokens of the highest-ranked sparse-autoencoder features of each trial's prompt.

    Features are ranked by their mean activation over the positions of `positions_of`, times
    log(1 / density). Each feature gives the tokens whose embeddings have the largest dot product
    with the feature's decoder row. A model with latent memory is read at the latents that its
    weaver writes after each prompt.

    Args:
        lm: Model with sites, whose tokenizer has a chat template.
        organism: Organism that is audited, whose `read_at` selects the positions.
        folder: Folder of an autoencoder that `audit sae` trained on this model.
        features: Maximum number of features of a trial; features with a score of 0 are left out.
        top: Number of tokens of each feature.

    Returns:
        A list for each trial with the texts of tokens, in the order of the features' ranks.

    Raises:
        ValueError: The folder holds no autoencoder, the autoencoder has another width, the
            tokenizer has no chat template, a prompt has none of the words of `read_at`, or no token
            stands for a secret (see `beginnings`).
    """
    check_vocabulary(lm, organism)
    sae, density, meta = load_sae(folder)
    prompts = [positions_of(lm, organism, trial.messages) for trial in organism.trials]
    width = max(len(ids) for ids, _ in prompts)
    model: Any = lm.model
    table = model.embed_tokens(jnp.arange(model.vocab_size))
    found: list[list[str]] = []
    for start in range(0, len(prompts), ROWS):
        read, tokens, mask, chosen = _rows(lm, prompts[start : start + ROWS], width)
        at = activation_of(read, tokens, mask.sum(axis=1), meta["site"])
        value, index = map(np.asarray, sae.features(at.x))
        # Slots of the streams that the autoencoder was trained on.
        here = np.asarray(
            selected(at, meta["streams"]) & jnp.take_along_axis(chosen, at.token, axis=1)
        )
        for row in range(min(ROWS, len(prompts) - start)):
            mean = np.zeros(len(density), np.float32)
            np.add.at(mean, index[row][here[row]], value[row][here[row]] / max(here[row].sum(), 1))
            score = np.asarray(feature_scores(jnp.asarray(mean), jnp.asarray(density)))
            best = np.argsort(-score, kind="stable")[:features]
            best = best[score[best] > 0]
            ids = np.asarray(nearest_tokens(sae, table, jnp.asarray(best), top)).ravel()
            found.append([lm.tokenizer.decode([token]) for token in ids if _known(lm, token)])
    return found


def positions_of(
    lm: LanguageModel, organism: Organism, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Find the positions of a prompt at which white-box methods read.

    Args:
        lm: Model whose tokenizer has a chat template.
        organism: Organism whose `read_at` lists the words at whose tokens to read. Without words,
            the positions are those of the control tokens that open the answer.
        messages: Messages of the prompt.

    Returns:
        Token ids of the prompt, and for each token whether it is read. With latent memory no token
        is read, since such a model is read at its latents.

    Raises:
        ValueError: The tokenizer has no chat template, or the prompt has none of the words of
            `read_at`.
    """
    tokenizer = chat_tokenizer(lm)
    ids = chat_ids(tokenizer, messages)
    if lm.memgen is not None:
        return ids, [False] * len(ids)
    if organism.read_at:
        here = _tokens_of_words(tokenizer, ids, organism.read_at)
        if not any(here):
            said = messages[-1]["content"][:60]
            raise ValueError(
                f"organism {organism.name}: the prompt {said!r} has no token of read_at "
                f"({', '.join(organism.read_at)}): change one of them"
            )
        return ids, here
    start = common(ids, closed_ids(tokenizer, messages))
    start = min(start, len(ids) - 1)  # a template without a generation prompt: the last token
    return ids, [index >= start for index in range(len(ids))]


def _tokens_of_words(
    tokenizer: PretrainedTokenizer, ids: Sequence[int], words: Sequence[str]
) -> list[bool]:
    """Return for each token whether it contains a character of one of the words."""
    text = tokenizer.decode(ids)
    # Tokens that end within a multi-byte character decode differently from the whole text, so a
    # prefix ends where the two texts begin to differ.
    ends = [
        len(os.path.commonprefix([text, tokenizer.decode(ids[:count])]))
        for count in range(len(ids) + 1)
    ]
    any_word = "|".join(map(re.escape, words))
    spans = [
        match.span()
        for match in re.finditer(rf"(?<![^\W_])(?:{any_word})(?![^\W_])", text, re.IGNORECASE)
    ]
    return [
        any(first < end and start < last for first, last in spans)
        for start, end in itertools.pairwise(ends)
    ]


def beginnings(lm: LanguageModel, candidates: Sequence[str]) -> dict[str, frozenset[str]]:
    """Find the tokens that stand for each candidate in the output of a lens.

    If the candidate's first word is a single token (with or without a preceding space, capitalised
    or not), only the word itself stands for the candidate. Otherwise the first tokens of these
    forms of the word do, except tokens that stand for another candidate too.

    Args:
        lm: Model that is read.
        candidates: Possible secrets.

    Returns:
        Mapping from candidate to texts of tokens in lower case; candidates that no token stands for
        are left out.
    """
    whole: dict[str, bool] = {}
    found: dict[str, set[str]] = {}
    for name in candidates:
        word = words_of(name)[0]
        texts = [
            [lm.tokenizer.decode([id_]).strip() for id_ in lm.tokenizer.encode(form)[0].tolist()]
            for form in (word, f" {word}", word.capitalize(), f" {word.capitalize()}")
        ]
        pieces = [[text for text in of if text] for of in texts]  # a space may be a token
        whole[name] = any(len(of) == 1 and same_word(of[0], word) for of in pieces)
        firsts = {of[0].lower() for of in pieces if of}
        found[name] = {word} if whole[name] else {each for each in firsts if word.startswith(each)}
    own: dict[str, frozenset[str]] = {}
    for name, texts in found.items():
        others = [each for other in found if other != name for each in found[other]]
        own[name] = frozenset(
            text for text in texts
            if whole[name] or not any(same_word(text, each) for each in others)
        )  # fmt: skip
    return {name: texts for name, texts in own.items() if texts}


def check_reading(lm: LanguageModel, organism: Organism, site: str, top: int) -> None:
    """Raise a ValueError unless a model can be read at a site in all trials of an organism.

    Args:
        lm: Model that is read.
        organism: Organism that is audited.
        site: Name of the site.
        top: Number of top tokens.
    """
    model: Any = lm.model
    check_sited(model)
    _check_latents(lm)
    check_sites((site,), (*model.sites, *getattr(model, "neuron_sites", ())))
    if top > model.vocab_size:
        raise ValueError(f"top={top} of {model.vocab_size} token ids: choose 1 to that many")
    check_vocabulary(lm, organism)
    for trial in organism.trials:
        positions_of(lm, organism, trial.messages)


def check_vocabulary(lm: LanguageModel, organism: Organism) -> None:
    """Raise a ValueError unless a lens can show each secret of an organism (see `beginnings`).

    Args:
        lm: Model that is read.
        organism: Organism that is audited.
    """
    shown = beginnings(lm, organism.candidates)
    for secret in dict.fromkeys(trial.secret for trial in organism.trials):
        if secret not in shown:
            raise ValueError(
                f"the secret {secret!r} is no token of {lm.tokenizer.name}, and begins with none "
                "of its own, so no lens can show it: choose another word, or leave the white-box "
                "methods out"
            )


def readable(lms: Sequence[LanguageModel], organism: Organism) -> Organism:
    """Remove candidates that a lens can't show on every model, and the trials of these candidates.

    If any candidate is removed, one line about the removal is printed.

    Args:
        lms: Models that are read.
        organism: Organism that is audited.

    Raises:
        ValueError: No trial is left.
    """
    shown = [beginnings(lm, organism.candidates) for lm in lms]
    kept = tuple(name for name in organism.candidates if all(name in of for of in shown))
    if len(kept) == len(organism.candidates):
        return organism
    trials = tuple(trial for trial in organism.trials if trial.secret in kept)
    if not trials:
        for lm in lms:
            check_vocabulary(lm, organism)
    names = ", ".join(name for name in organism.candidates if name not in kept)
    print(
        f"organism {organism.name}: {names} left out for all models, with "
        f"{len(organism.trials) - len(trials)} of {len(organism.trials)} trials, since no token "
        "is theirs alone"
    )
    return dataclasses.replace(organism, candidates=kept, trials=trials)


def _check_latents(lm: LanguageModel) -> None:
    if lm.memgen is not None and not lm.memgen.config.weaver.prompt_latents:
        raise ValueError(
            "prompt_latents=0: the weaver writes no latents before an answer, so there are none to "
            "read: leave the white-box methods out"
        )


def _known(lm: LanguageModel, token: int) -> bool:
    return 0 <= token < lm.tokenizer.vocab_size


def _rows(
    lm: LanguageModel, prompts: Sequence[tuple[list[int], list[bool]]], width: int
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """Pad prompts to `ROWS` rows whose length is a power of two, so that they share a program.

    Returns:
        Model to read; token ids `[B, S]`; which tokens are real, `[B, S]` bool; and which tokens
        are read, `[B, S]` bool, for `B` = `ROWS`. With latent memory, the token ids are replaced by
        vectors `[B, S, D]` of each prompt and the latents after it, and the latents are read.
    """
    width = max(16, 1 << (width - 1).bit_length())
    tokens = np.zeros((ROWS, width), np.int32)
    mask, chosen = np.zeros((ROWS, width), bool), np.zeros((ROWS, width), bool)
    for row, (ids, here) in enumerate(prompts):
        tokens[row, : len(ids)], mask[row, : len(ids)], chosen[row, : len(ids)] = ids, True, here
    mask[len(prompts) :, 0] = True  # rows of padding, which are left out afterwards
    rows = jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(chosen)
    if lm.memgen is None:
        return lm.model, *rows
    _check_latents(lm)
    woven = prompts_with_latents(lm.memgen, rows[0], rows[1].sum(axis=1))
    return woven.model, woven.inputs_embeds, woven.mask, woven.latent
