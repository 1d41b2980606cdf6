"""Token rows of a corpus for audits, and activations of a model on token rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.sites import Activation, capture, check_sited, check_sites
from train.cli.config_json import from_json
from train.data import (
    DataConfig,
    MixtureData,
    MixtureReader,
    PackedData,
    TrainReader,
    evaluation_batches,
    prepare,
)
from train.models.load import LanguageModel, LoadedRun, keep_tokenizer


def open_texts(lm: LanguageModel, corpus: str | None, seq_len: int | None) -> PackedData:
    """Prepare packed rows of a corpus, tokenized by a model's tokenizer.

    Args:
        lm: Model with its tokenizer.
        corpus: Corpus, as in `DataConfig.corpus`; None for the corpus of the model's own run.
        seq_len: Number of targets per row; None for the length of the run's rows, or 256 if the
            model has no run with a corpus.

    Raises:
        ValueError: `corpus` is None and the model has no run with a corpus.
    """
    data = DataConfig()
    run = lm if isinstance(lm, LoadedRun) and "weights" not in lm.config else None
    if run is not None:
        data = from_json(DataConfig, run.config.get("data"), "data")
    elif corpus is None:
        raise ValueError("corpus=None: this model has no corpus of its own, pass --corpus stdlib")
    data = dataclasses.replace(data, corpus=corpus or data.corpus, seq_len=seq_len or data.seq_len)
    if run is None:
        data = dataclasses.replace(data, tokenizer=keep_tokenizer(lm.tokenizer, data))
    return prepare(data)


def token_text(lm: LanguageModel, id_: int) -> str:
    """Return the text of a token id; "<id>" for an id beyond the tokenizer's vocabulary."""
    return lm.tokenizer.decode([id_]) if id_ < lm.tokenizer.vocab_size else f"<{id_}>"


def training_batches(data: PackedData, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield endless batches of shuffled training rows: inputs `[B, T]` int32."""
    kind = MixtureReader if isinstance(data, MixtureData) else TrainReader
    rows: Any = data if isinstance(data, MixtureData) else data.train
    for batch in kind(rows, batch_size, seed).iterate():
        yield batch["tokens"][:, :-1]


def held_out_batches(data: PackedData, batch_size: int, limit: int) -> Iterator[np.ndarray]:
    """Yield batches of up to `limit` evenly spaced held-out rows, `[B, T + 1]` int32.

    The last column has the target of each row's last input; -1 is padding.
    """
    limit = min(limit, len(data.validation))
    for batch in evaluation_batches(data.validation, batch_size, limit):
        yield batch["tokens"]


def check_site(lm: LanguageModel, site: str | None) -> str:
    """Return the name of a site after checking it; None chooses the block in the middle.

    Raises:
        ValueError: The model has no sites, or no site of this name.
    """
    model: Any = lm.model
    check_sited(model)
    if site is None:
        blocks = [name for name in model.sites if name.startswith("block_")] or model.sites
        return blocks[len(blocks) // 2]
    check_sites((site,), (*model.sites, *getattr(model, "neuron_sites", ())))
    return site


@jax.jit
def _site_of(model: Any, tokens: jax.Array, length: jax.Array, site: Any) -> Activation:
    mask = jnp.arange(tokens.shape[1]) < length[:, None]
    [found] = capture(model, tokens, mask, sites=(site.name,))[1].values()
    return found


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Name:
    """Name of a site as a static argument of a compiled function."""

    name: str


def activation_at(model: Any, rows: np.ndarray, site: str) -> Activation:
    """Compute the activation of token rows `[B, T]` int32 at a site; -1 is padding on the right."""
    length = jnp.asarray((rows >= 0).sum(axis=1), jnp.int32)
    return activation_of(model, jnp.asarray(np.maximum(rows, 0)), length, site)


def activation_of(model: Any, tokens: jax.Array, length: jax.Array, site: str) -> Activation:
    """Compute the activation of rows at a site.

    Args:
        model: Model with sites.
        tokens: Token ids `[B, T]` int32 padded on the right, or vectors `[B, T, D]` in their place.
        length: Number of real tokens in each row, `[B]` int32.
        site: Name of the site.
    """
    return _site_of(model, tokens, length, _Name(site))
