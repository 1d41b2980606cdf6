"""Ranks of a secret among the candidates, by the logit lens: in roots, in forks, and in latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Rows that a lens reads.

    Attributes:
        model: Model with sites.
        inputs: Token ids `[B, T]` int32, or vectors `[B, T, D]` in their place.
        mask: `[B, T]` bool, which of them are real.
        parts: Masks `[B, T]` bool of parts of the rows, by name.
    """

    model: Any
    inputs: Any
    mask: np.ndarray
    parts: Mapping[str, np.ndarray]


class Ranks(NamedTuple):
    """What a lens reads at one site.

    Attributes:
        rank: `[B, S]` int, rank of the secret among the candidates in each stream, from 0 (the most
            probable candidate).
        alive: `[B, S]` bool, whether the stream exists.
        depth: `[B, S]` int, 0 for a root.
        token: `[B, S]` int, index of the stream's token in its row.
        chance: Mean rank of a guess.
    """

    rank: np.ndarray
    alive: np.ndarray
    depth: np.ndarray
    token: np.ndarray
    chance: float

    def mean(self, row: int, tokens: np.ndarray, forks: bool) -> float:
        """Mean rank in the roots or forks of a row's tokens `[T]` bool; NaN if there are none."""
        here = self.alive[row] & tokens[self.token[row]] & ((self.depth[row] > 0) == forks)
        return float(self.rank[row][here].mean()) if here.any() else float("nan")

    def by_row(self, own: np.ndarray, forks: bool) -> np.ndarray:
        """Mean ranks `[B]` in the roots or forks of tokens `[B, T]` bool; NaN if there are none."""
        return np.array([self.mean(row, tokens, forks) for row, tokens in enumerate(own)])


def ranks_by_depth(lm: LanguageModel, organism: Organism, asked: Organism) -> Lines:
    """Where the secret stands among the candidates, in forks and in roots of the prompts' tokens.

    Args:
        lm: Model that forks.
        organism: What is audited.
        asked: The same without a request in front; only tokens of these prompts count.

    Returns:
        For each site behind the first fork: `root` and `fork`, mean ranks over all tokens of the
        prompts that have a fork; `difference`, the mean of root minus fork, positive where forks
        know more, with its standard error over prompts; `tokens`, how many there are; `chance`, the
        rank of a guess.
    """
    prompts = [positions_of(lm, organism, trial.messages)[0] for trial in organism.trials]
    # Behind the two tokens that open the user's turn, and what is put in front of the prompt.
    own = [len(positions_of(lm, asked, trial.messages)[0]) - 2 for trial in asked.trials]
    starts = [len(prompt) - count for prompt, count in zip(prompts, own, strict=True)]
    texts = _texts(lm, prompts, starts)
    return _by_depth(_read(lm, organism, texts), texts.parts["own"])


def ranks_with_memory(
    lm: LanguageModel, organism: Organism, answers: Sequence[str]
) -> dict[str, Lines]:
    """Where the secret stands in latents, and in the answers of the stream that speaks.

    Args:
        lm: Model that forks, with latent memory.
        organism: What is audited.
        answers: Answer of the model to each trial.

    Returns:
        Under "hiding" and "control" what `ranks_by_depth` returns, of latents and answers, and of
        the same answers read by the model without memory. Under "latents", for each site: mean
        ranks in the roots and forks of latents (`latent`, `latent_fork`) and of the answer's tokens
        (`answer`, `answer_fork`), and in roots of the answer without memory (`control`);
        `difference`, the mean of answer minus latent in roots, positive where latents know more,
        with its standard error over prompts; `latent_difference`, the mean of root minus fork of
        those latents that have a fork, with its standard error; `chance`.
    """
    assert lm.memgen is not None
    prompts = [positions_of(lm, organism, trial.messages)[0] for trial in organism.trials]
    said = [lm.tokenizer.encode(answer)[0].tolist() for answer in answers]
    rows = [prompt + answer for prompt, answer in zip(prompts, said, strict=True)]
    control = _texts(lm, rows, [*map(len, prompts)])
    starts = jnp.array([*map(len, prompts)], jnp.int32)[:, None]
    plan = Plan.of(starts, jnp.zeros_like(starts), lm.memgen.config)
    woven = woven_rows(lm.memgen, control.inputs, plan)
    length = np.asarray(plan.width)[:, :1] + np.array([*map(len, rows)])[:, None]
    at = np.arange(woven.mask.shape[1])
    latent, mask = np.asarray(woven.latent), at < length
    parts = {"own": mask & (at >= np.asarray(starts)), "latent": latent}
    parts["answer"] = parts["own"] & ~latent
    texts = Texts(woven.model, woven.stream, mask, parts)
    found, plain = _read(lm, organism, texts), _read(lm, organism, control)
    pairs, lines = _by_depth(found, latent), {}
    for site, ranks in found.items():
        of = {
            name + "_fork" * forks: ranks.by_row(parts[name], forks)
            for name in ("latent", "answer")
            for forks in (False, True)
        }
        of["control"] = plain[site].by_row(control.parts["own"], False)
        means = {name: float(values.mean()) for name, values in of.items()}
        lines[site] = {name: mean for name, mean in means.items() if not np.isnan(mean)}
        lines[site] |= _spread(of["answer"] - of["latent"]) | {"chance": ranks.chance}
        if site in pairs:
            lines[site]["latent_difference"] = pairs[site]["difference"]
            lines[site]["latent_standard_error"] = pairs[site]["standard_error"]
    return {
        "hiding": _by_depth(found, parts["own"]),
        "control": _by_depth(plain, control.parts["own"]),
        "latents": lines,
    }


def _texts(lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Texts:
    """Pad rows of token ids; what stands from `starts` on is their own part."""
    width = max(16, 1 << (max(map(len, rows)) - 1).bit_length())
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    own = mask & (np.arange(width) >= np.array(starts)[:, None])
    return Texts(lm.model, jnp.asarray(tokens), mask, {"own": own})


def _read(lm: LanguageModel, organism: Organism, texts: Texts) -> dict[str, Ranks]:
    """Read the ranks at all forks and blocks."""
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
    """Mean ranks in roots and forks of those own tokens `[B, T]` bool that have a fork."""
    lines = {}
    for site, ranks in [*found.items()][1:]:
        root, fork, differences = [], [], []
        for row, mask in enumerate(own):
            each = np.array([
                [ranks.mean(row, np.arange(len(mask)) == index, forks) for forks in (False, True)]
                for index in np.flatnonzero(mask)
            ])  # fmt: skip
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
    """Mean and standard error over prompts."""
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return {
        "difference": float(np.mean(differences)),
        "standard_error": spread / len(differences) ** 0.5,
    }
