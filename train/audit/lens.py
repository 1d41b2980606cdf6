"""Read a text at each site of a model by a lens; print a table, and write an HTML page."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memgen import MemGen
from thoughtbubbles.lens import Reading, TopTokens, TunedLens, embedding_similarity, logit_lens
from thoughtbubbles.pages import Guess, Page, lens_page
from thoughtbubbles.sites import check_sited, check_sites
from train.audit.latents import prompts_with_latents
from train.audit.texts import token_text
from train.audit.tuned_lens import load_tuned_lens
from train.models.load import LanguageModel, check_named, load_named
from train.models.text_memory import check_text_memory

FIRST = 3  # number of top tokens that a page shows for each stream


@dataclasses.dataclass(frozen=True)
class LensConfig:
    """Reads a text at every site of a model: logit lens, tuned lens, or embeddings.

    Attributes:
        checkpoint: Run folder, or the folder of one of its steps.
        model: Pretrained weights in place of a checkpoint: "smollm2", a Hugging Face folder, or a
            .gguf file.
        text: Text to read.
        watch: Words to watch. For the first token of each word, the rank at the last token of the
            text is printed.
        sites: Names of the sites to read, e.g. block_3; all sites of the model by default.
        cosine: Whether to rank tokens by the cosine of their embeddings to the activation, in place
            of a lens.
        tuned: Folder of a tuned lens (`thoughtbubbles audit tuned-lens`); none by default.
        top: Number of top tokens shown at each site.
        page: HTML file for an interactive page of all tokens and sites; none by default.
    """

    checkpoint: str | None = None
    model: str | None = None
    text: str = "The capital of France is"
    watch: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    cosine: bool = False
    tuned: str | None = None
    top: int = 5
    page: str | None = None

    def __post_init__(self):
        check_named(self.checkpoint, self.model)
        if self.top < 1:
            raise ValueError(f"top={self.top}: choose 1 or more")
        if self.cosine and self.tuned is not None:
            raise ValueError(f"cosine=True needs no tuned lens, {self.tuned}: leave one out")
        if self.page is not None and not Path(self.page).absolute().parent.is_dir():
            raise ValueError(f"page {self.page}: its folder does not exist, make it")


@dataclasses.dataclass(frozen=True)
class TextReading:
    """Top tokens that a lens reads at each site and token of one text.

    Attributes:
        tokens: Label of each input vector: the text of a token, or "latent 0", "latent 1", ...
        readings: Mapping from the name of a site to its reading, in NumPy arrays.
        cosine: Whether values are cosines; otherwise they are log-probabilities.
    """

    tokens: tuple[str, ...]
    readings: dict[str, Reading]
    cosine: bool


def main(config: LensConfig) -> None:
    """Print the top tokens of each site at the text's last token, and write the page, if any."""
    lm = load_named(config.checkpoint, config.model)
    watched = [watched_token(lm, word) for word in config.watch]
    tuned = None if config.tuned is None else load_tuned_lens(config.tuned, lm.model)
    found = read_text(
        lm, config.text, sites=config.sites or None, top=config.top,
        watch=[id_ for id_, _ in watched], cosine=config.cosine, tuned=tuned,
    )  # fmt: skip
    print(table(found, lm, [label for _, label in watched]))
    if config.page is not None:
        page(found, lm).save(config.page)
        print(f"page: {Path(config.page).absolute()}")


def watched_token(lm: LanguageModel, word: str) -> tuple[int, str]:
    """Return the id of a word's first token and a label that names the word and this token.

    The word is tokenized with a space in front. Where that space is a token of its own, the word is
    tokenized without it. Raises a ValueError if the word has no token.
    """
    ids = lm.tokenizer.encode(f" {word}")[0].tolist()
    if ids and not lm.tokenizer.decode(ids[:1]).strip():
        ids = lm.tokenizer.encode(word)[0].tolist()
    if not ids:
        raise ValueError(f"watch={word!r} has no token: choose another word")
    part = f", the first of {len(ids)} tokens" if len(ids) > 1 else ""
    return ids[0], f"{word} ({token_text(lm, ids[0])!r}{part})"


def read_text(
    lm: LanguageModel,
    text: str,
    *,
    sites: Sequence[str] | None = None,
    top: int = 5,
    watch: Sequence[int] = (),
    cosine: bool = False,
    tuned: TunedLens | None = None,
) -> TextReading:
    """Read the top tokens at all sites and tokens of a text by a lens.

    A model with latent memory weaves latents after the text, which are read too.

    Args:
        lm: Model with its tokenizer.
        text: Text to read.
        sites: Names of the sites to read; None for all sites of the model.
        top: Number of top token ids that are kept at each site.
        watch: Token ids whose values and ranks are recorded.
        cosine: Whether to rank tokens by cosines of embeddings to activations, in place of a lens.
        tuned: Affine maps of a tuned lens; None for the logit lens.

    Raises:
        ValueError: The model has no sites or lacks a named one, or the text does not fit into the
            device's memory.
    """
    model: Any = lm.model
    check_sited(model)
    check_sites(sites or (), model.sites)
    ids = lm.prompt(text)
    check_text_memory(lm.model, 1, len(ids), cached=False)
    tokens = [lm.tokenizer.decode([id_]) for id_ in ids]
    options: dict[str, Any] = {
        "sites": None if sites is None else tuple(sites),
        "top": min(top, model.vocab_size),
        "watch": jnp.asarray(watch, jnp.int32),
    }
    lens: Callable[..., Any] = embedding_similarity
    if not cosine:
        lens = functools.partial(logit_lens, tuned=tuned)
    if lm.memgen is None:
        rows, mask = jnp.asarray([ids], jnp.int32), None
    else:
        model, rows, mask, names = _with_memory(lm.memgen, ids)
        tokens += names
    found = jax.device_get(lens(model, rows, mask, **options))
    return TextReading(tuple(tokens), found, cosine)


def _with_memory(memgen: MemGen, ids: list[int]) -> tuple[Any, Any, Any, list[str]]:
    """Return the reasoner, vectors and mask of a text with memory after it, and latents' labels."""
    rows = prompts_with_latents(memgen, jnp.asarray([ids], jnp.int32), jnp.asarray([len(ids)]))
    count = int(rows.latent.sum())
    size = len(ids) + count
    names = [f"latent {index}" for index in range(count)]
    return rows.model, rows.inputs_embeds[:, :size], rows.mask[:, :size], names


def table(found: TextReading, lm: LanguageModel, watched: Sequence[str] = ()) -> str:
    """Format the top tokens at the last token of the text as one line for each site.

    Args:
        found: Readings of the text.
        lm: Model with its tokenizer.
        watched: Labels of the watched tokens, whose ranks are shown in each line.
    """
    width = max(map(len, found.readings))
    lines = []
    for site, reading in found.readings.items():
        at = jax.tree.map(lambda leaf: leaf[0, len(found.tokens) - 1], reading.tokens)
        ranks = [f"{word}: rank {rank}" for word, rank in zip(watched, at.rank, strict=True)]
        forks = reading.divergence[0][reading.rows.parent[0] >= 0]
        added = [f"forks add {forks.mean():.3f} nats"] if len(forks) else []
        lines.append("  ".join([f"{site:<{width}}", said(at, lm, found.cosine), *ranks, *added]))
    return "\n".join(lines)


def said(top: TopTokens, lm: LanguageModel, cosine: bool, most: int | None = None) -> str:
    """Format the top tokens of one slot or token with their probabilities or cosines.

    Args:
        top: Readings of the slot or token, without leading axes.
        lm: Model with its tokenizer.
        cosine: Whether values are cosines; otherwise they are log-probabilities.
        most: Maximum number of tokens; None for all.
    """
    pairs = list(zip(top.ids.tolist(), top.value.tolist(), strict=True))[:most]
    return " ".join(
        f"{token_text(lm, id_)!r} {value if cosine else np.exp(value):.3f}" for id_, value in pairs
    )


def page(found: TextReading, lm: LanguageModel) -> Page:
    """Make the page of a text: a grid of top tokens by site and token.

    Hovering over a token shows more top tokens, and the readings of its streams if it has several.

    Args:
        found: Readings of the text.
        lm: Model with its tokenizer.
    """
    guesses = []
    for reading in found.readings.values():
        row = []
        for at in range(len(found.tokens)):
            top = jax.tree.map(lambda leaf, at=at: leaf[0, at], reading.tokens)
            lines = [said(top, lm, found.cosine), *_streams(reading, at, lm, found.cosine)]
            strength = float(top.value[0] if found.cosine else np.exp(top.value[0]))
            row.append(Guess(token_text(lm, int(top.ids[0])), strength, lines))
        guesses.append(row)
    what = "nearest embedding" if found.cosine else "most probable next token"
    note = f"above each token its {what} at each site; rest the mouse on one for more"
    return lens_page("Lens", note, found.tokens, list(found.readings), guesses)


def _streams(reading: Reading, at: int, lm: LanguageModel, cosine: bool) -> list[str]:
    rows = reading.rows
    slots = np.flatnonzero((rows.token[0] == at) & rows.alive[0])
    if len(slots) < 2:
        return []
    lines = []
    for slot in slots:
        top = jax.tree.map(lambda leaf, slot=slot: leaf[0, slot], reading.streams)
        kind = "original" if slot == slots[-1] else f"fork of depth {rows.depth[0, slot]}"
        score = np.exp(rows.log_score[0, slot])
        line = f"{kind}, score {score:.3f}: {said(top, lm, cosine, FIRST)}"
        if rows.parent[0, slot] >= 0 and not cosine:
            line += f"; adds {reading.divergence[0, slot]:.3f} nats to its parent"
        lines.append(line)
    return lines
