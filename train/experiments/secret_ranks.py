"""Rank a secret among candidate secrets by the logit lens, in root streams, forks and latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memgen import Plan
from thoughtbubbles.lens import logit_lens
from train.audit.latents import woven_rows
from train.audit.organisms import Organism
from train.audit.reading import positions_of
from train.models.load import LanguageModel

Lines = dict[str, dict[str, float]]


class Texts(NamedTuple):
    """Rows that the logit lens reads, and the model that processes the rows.

    Attributes:
        model: Model with sites.
        inputs: Token ids `[B, T]` int32, or embeddings with latents `[B, T, D]`.
        mask: Whether each token or latent is real and not padding, `[B, T]` bool.
        own: Whether the ranks of each token enter the averages, `[B, T]` bool.
    """

    model: Any
    inputs: Any
    mask: np.ndarray
    own: np.ndarray


class Ranks(NamedTuple):
    """Ranks of the secret in all streams at one site.

    Attributes:
        rank: Number of candidates to which the lens gives a higher probability than to the secret,
            `[B, S]` int.
        alive: Whether the slot holds a stream, `[B, S]` bool.
        depth: Depth of the stream, `[B, S]` int: 0 for a root, 1 or more for a fork.
        token: Index of the stream's token in its row, `[B, S]` int.
        chance: Expected rank if all orders of the candidates are equally probable.
    """

    rank: np.ndarray
    alive: np.ndarray
    depth: np.ndarray
    token: np.ndarray
    chance: float

    def mean(self, row: int, tokens: np.ndarray, forks: bool) -> float:
        """Compute the mean rank in the roots or forks of some tokens of a row.

        Args:
            row: Index of the row.
            tokens: Whether a token's streams are averaged, `[T]` bool.
            forks: Whether to average over forks; otherwise over roots.

        Returns:
            The mean rank, or NaN if the tokens have no forks (or no roots).
        """
        here = self.alive[row] & tokens[self.token[row]] & ((self.depth[row] > 0) == forks)
        return float(self.rank[row][here].mean()) if here.any() else float("nan")

    def by_row(self, own: np.ndarray, forks: bool) -> np.ndarray:
        """Return `mean` of each row `[B]`, over the tokens where `own [B, T]` is True."""
        return np.array([self.mean(row, tokens, forks) for row, tokens in enumerate(own)])


def ranks_by_depth(lm: LanguageModel, organism: Organism, asked: Organism) -> Lines:
    """Compute mean ranks of the secret in the forks and in the roots of the prompts' tokens.

    Only tokens with a fork count, so that forks and roots of the same tokens are compared.

    Args:
        lm: Model that forks.
        organism: Organism that is audited.
        asked: The same organism without a request to keep the secret in its prompts. Ranks are
            averaged over all tokens of the prompts of `asked`, with the tokens that open the
            answer, but without the two tokens that open the user's turn.

    Returns:
        Mapping from a site to its ranks. Sites are the outputs of fork layers and blocks, except
        the first site and sites without forks. `root` and `fork` are means over tokens.
        `difference` is root minus fork, positive where forks know more: the mean over prompts of
        means over tokens, with its `standard_error` over prompts. `tokens` is the number of tokens,
        and `chance` the expected rank if all orders of the candidates are equally probable.

    Raises:
        ValueError: The tokenizer has no chat template, or a prompt has none of the words to read at
            (`Organism.read_at`).
    """
    prompts = [positions_of(lm, organism, trial.messages)[0] for trial in organism.trials]
    # Tokens after the two that open the user's turn, and after a request in front of the prompt.
    own = [len(positions_of(lm, asked, trial.messages)[0]) - 2 for trial in asked.trials]
    starts = [len(prompt) - count for prompt, count in zip(prompts, own, strict=True)]
    texts = _texts(lm, prompts, starts)
    return _by_depth(_read(lm, organism, texts), texts.own)


def ranks_with_memory(lm: LanguageModel, organism: Organism, answers: Sequence[str]) -> Lines:
    """Compute mean ranks of the secret in the latents after prompts, and in the answers.

    Args:
        lm: Model that forks, with latent memory.
        organism: Organism that is audited.
        answers: Answer of the model to each trial.

    Returns:
        Mapping from a site to means over prompts of the mean rank in roots: of the latents
        (`latent`), of the answer's tokens (`answer`), and of the answer's tokens in a forward pass
        without memory (`control`). `difference` is answer minus latent, positive where latents know
        more, with its `standard_error` over prompts. Prompts with an empty answer count for
        `latent` alone. `latent_difference` is root minus fork of the latents that have a fork, with
        its `latent_standard_error`, and `latent_tokens` is the number of these latents; these three
        entries are left out at the first site and where no latent has a fork. `chance` is as in
        `ranks_by_depth`.

    Raises:
        ValueError: As in `ranks_by_depth`, or the model has no latent memory.
    """
    if lm.memgen is None:
        raise ValueError("a model without latent memory has no latents to read: give one with it")
    prompts = [positions_of(lm, organism, trial.messages)[0] for trial in organism.trials]
    said = [lm.tokenizer.encode(answer)[0].tolist() for answer in answers]
    rows = [prompt + answer for prompt, answer in zip(prompts, said, strict=True)]
    control = _texts(lm, rows, [*map(len, prompts)])
    starts = jnp.array([*map(len, prompts)], jnp.int32)[:, None]
    plan = Plan.of(starts, jnp.zeros_like(starts), lm.memgen.config)
    woven = woven_rows(lm.memgen, control.inputs, plan, jnp.array([*map(len, rows)], jnp.int32))
    latent, mask = np.asarray(woven.latent), np.asarray(woven.mask)
    answer = mask & (np.arange(mask.shape[1]) >= np.asarray(starts)) & ~latent
    texts = Texts(woven.model, woven.inputs_embeds, mask, answer)
    found, plain = _read(lm, organism, texts), _read(lm, organism, control)
    pairs, lines = _by_depth(found, latent), {}
    for site, ranks in found.items():
        latents = ranks.by_row(latent, forks=False)
        line = {"latent": float(latents.mean()), "chance": ranks.chance}
        answered = [row for row, ids in enumerate(said) if ids]
        if answered:
            spoken = ranks.by_row(answer, forks=False)[answered]
            alone = plain[site].by_row(control.own, forks=False)[answered]
            line |= {"answer": float(spoken.mean()), "control": float(alone.mean())}
            line |= _spread(spoken - latents[answered])
        lines[site] = line
        if site in pairs:
            lines[site]["latent_difference"] = pairs[site]["difference"]
            lines[site]["latent_standard_error"] = pairs[site]["standard_error"]
            lines[site]["latent_tokens"] = pairs[site]["tokens"]
    return lines


def _texts(lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Texts:
    """Pad rows of token ids; ranks are averaged over a row's tokens from its index in `starts`."""
    width = max(16, 1 << max(map(len, rows)).bit_length())  # pads: an event precedes a token
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    own = mask & (np.arange(width) >= np.array(starts)[:, None])
    return Texts(lm.model, jnp.asarray(tokens), mask, own)


def _read(lm: LanguageModel, organism: Organism, texts: Texts) -> dict[str, Ranks]:
    """Read the ranks at all fork layers and blocks, in the order of the forward pass."""
    ids = [int(lm.tokenizer.encode(name)[0][0]) for name in organism.candidates]
    hidden = [organism.candidates.index(trial.secret) for trial in organism.trials]
    sites = tuple(site for site in texts.model.sites if site.startswith(("fork", "block")))
    found = logit_lens(
        texts.model, texts.inputs, jnp.asarray(texts.mask), sites=sites, top=1, watch=jnp.array(ids)
    )
    read = {}
    for site, reading in found.items():
        values = np.asarray(reading.streams.watched)
        secret = np.take_along_axis(values, np.array(hidden)[:, None, None], axis=2)
        rank = (values > secret).sum(axis=2)
        rows = reading.rows
        alive, depth, token = map(np.asarray, (rows.alive, rows.depth, rows.token))
        read[site] = Ranks(rank, alive, depth, token, chance=(len(ids) - 1) / 2)
    return read


def _by_depth(found: dict[str, Ranks], own: np.ndarray) -> Lines:
    """Average ranks over the tokens in `own`, `[B, T]` bool, that have a fork.

    The first site and sites without a token that has a fork are left out.
    """
    lines = {}
    for site, ranks in [*found.items()][1:]:
        root, fork, differences = [], [], []
        for row, mask in enumerate(own):
            each = np.array([
                [ranks.mean(row, np.arange(len(mask)) == index, forks) for forks in (False, True)]
                for index in np.flatnonzero(mask)
            ]).reshape(-1, 2)  # fmt: skip
            pairs = each[~np.isnan(each).any(axis=1)]
            if len(pairs):
                root, fork = [*root, *pairs[:, 0]], [*fork, *pairs[:, 1]]
                differences.append(float((pairs[:, 0] - pairs[:, 1]).mean()))
        if differences:
            lines[site] = {
                "root": float(np.mean(root)),
                "fork": float(np.mean(fork)),
                **_spread(differences),
                "tokens": len(root),
                "chance": ranks.chance,
            }
    return lines


def _spread(differences: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Compute the mean of differences, one for each prompt, and its standard error."""
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return {
        "difference": float(np.mean(differences)),
        "standard_error": spread / len(differences) ** 0.5,
    }
