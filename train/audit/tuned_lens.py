"""Train a tuned lens (arXiv 2303.08112): thoughtbubbles audit tuned-lens --checkpoint RUN"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from thoughtbubbles.lens import TunedLens, by_site, translated
from thoughtbubbles.sites import Lineage, one_per_token, record
from thoughtbubbles.streams import Streams
from train.audit.stored import read_stored, save_stored
from train.audit.texts import check_site, held_out_batches, open_texts, training_batches
from train.cli.numbers import check_least
from train.models.load import check_named, load_named
from train.runs.files import new_folder, write_atomically

KIND = "tuned lens"


@dataclasses.dataclass(frozen=True)
class TunedLensConfig:
    """Trains an affine map for each site, by the KL divergence to the model's own prediction.

    Attributes:
        checkpoint: Run folder, or the folder of one of its steps.
        model: Pretrained weights in place of a checkpoint: "smollm2", a Hugging Face folder, or a
            .gguf file.
        corpus: Corpus of the texts; by default the corpus of the run.
        seq_len: Number of tokens per row; by default as in the run, or 256 without a run.
        steps: Number of optimizer steps.
        batch_size: Number of rows per step.
        learning_rate: Initial learning rate of Adam, which falls linearly to 0.
        held_out: Number of held-out rows for the metrics.
        seed: Seed of the rows' order.
        out: New folder for the lens and its metrics.
    """

    checkpoint: str | None = None
    model: str | None = None
    corpus: str | None = None
    seq_len: int | None = None
    steps: int = 250
    batch_size: int = 16
    learning_rate: float = 1e-3
    held_out: int = 64
    seed: int = 0
    out: str = "runs/tuned_lens"

    def __post_init__(self):
        check_named(self.checkpoint, self.model)
        check_least(self, steps=1, batch_size=1, held_out=1, seq_len=1)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: choose more than 0")


def main(config: TunedLensConfig) -> None:
    """Train and write a lens, and print the divergence of logit and tuned lens at each site."""
    out = new_folder(config.out)
    lm = load_named(config.checkpoint, config.model)
    check_site(lm, None)
    model: Any = lm.model
    data = open_texts(lm, config.corpus, config.seq_len)
    first = TunedLens.identity(model.sites[:-1], model.embed_dim)
    rows = training_batches(data, config.batch_size, config.seed)
    lens = train(config, model, first, rows)
    held_out = list(held_out_batches(data, config.batch_size, config.held_out))
    metrics = {
        site: {"logit_lens": before, "tuned_lens": after}
        for site, before, after in zip(
            lens.sites, divergence(model, first, held_out), divergence(model, lens, held_out),
            strict=True,
        )
    }  # fmt: skip
    meta = {"sites": list(lens.sites), "of": config.checkpoint or config.model, "metrics": metrics}
    save_stored(out, KIND, {"weight": lens.weight, "bias": lens.bias}, meta)
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for site, values in metrics.items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"{site}: KL to the model's prediction in nats: {shown}")


def load_tuned_lens(folder: str | Path, model: Any) -> TunedLens:
    """Load a tuned lens, and check that it fits a model.

    Args:
        folder: Folder that `audit tuned-lens` wrote.
        model: Model with sites.

    Raises:
        ValueError: The folder holds no tuned lens, or the lens's sites or width are not the
            model's.
    """
    meta, leaves = read_stored(folder, KIND, ("weight", "bias"))
    lens = TunedLens(jnp.asarray(leaves["weight"]), jnp.asarray(leaves["bias"]), (*meta["sites"],))
    found = (*lens.sites, lens.bias.shape[-1])
    expected = (*model.sites[:-1], model.embed_dim)
    if found != expected:
        raise ValueError(
            f"{folder} is a lens of {len(lens.sites)} sites of width {lens.bias.shape[-1]}, the "
            f"model has {len(model.sites) - 1} of {model.embed_dim}: train one for this model"
        )
    return lens


def train(config: TunedLensConfig, model: Any, lens: TunedLens, rows: Any) -> TunedLens:
    """Train a lens by the KL divergence to the model's own prediction.

    Args:
        config: Options of the training.
        model: Model with sites, which is not changed.
        lens: Lens before training.
        rows: Iterator of token rows `[B, T]` int32, without padding.

    Returns:
        The trained lens.
    """
    rate = optax.linear_schedule(config.learning_rate, 0.0, config.steps)
    adam = optax.adam(rate)

    @jax.jit
    def step(lens: TunedLens, state: Any, model: Any, tokens: jax.Array) -> Any:
        real = jnp.ones(tokens.shape, bool)
        loss = lambda lens: divergences(model, lens, tokens, real).sum()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(lens)
        updates, state = adam.update(gradient, state)
        return jax.tree.map(jnp.add, lens, updates), state, value

    state: Any = adam.init(lens)  # pyright: ignore[reportArgumentType]
    for number, tokens in zip(range(config.steps), rows, strict=False):
        lens, state, value = step(lens, state, model, jnp.asarray(tokens))
        if (number + 1) % max(config.steps // 10, 1) == 0:
            print(f"step {number + 1} of {config.steps}  divergence {value:.4g}")
    return lens


def divergence(model: Any, lens: TunedLens, batches: list[np.ndarray]) -> list[float]:
    """Compute the mean of `divergences` over all tokens of held-out batches.

    Args:
        model: Model with sites.
        lens: Lens.
        batches: Token rows `[B, T + 1]` int32, padded with -1.

    Returns:
        Nats per token at each site of the lens.
    """
    total, count = np.zeros(len(lens.sites)), 0
    for rows in batches:
        tokens, real = jnp.maximum(rows[:, :-1], 0), jnp.asarray(rows[:, :-1] >= 0)
        number = int(real.sum())
        total += np.asarray(_divergences(model, lens, tokens, real)) * number
        count += number
    return (total / max(count, 1)).tolist()


def divergences(model: Any, lens: TunedLens, tokens: jax.Array, real: jax.Array) -> jax.Array:
    """Compute the mean KL divergence from the model's prediction to the lens's at each site.

    Args:
        model: Model with sites.
        lens: Lens with `N` sites.
        tokens: Token ids `[B, T]` int32.
        real: Whether each token is real, `[B, T]` bool; padding stands on the right.

    Returns:
        KL divergence in nats per real token at each site of the lens, `[N]` float32.
    """
    logits, found = record(model, tokens, real.sum(axis=1), lens.sites, None)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits.astype(jnp.float32)))

    @jax.checkpoint  # one site's logits at a time are in memory, in the backward pass too
    def at_site(streams: Streams, lineage: Lineage, affine: Any) -> jax.Array:
        streams = streams.replace(x=translated(streams.x, affine))
        single = one_per_token(streams)
        site_logits = model.decode(streams.x) if single else model.logits(streams)
        log_q = jax.nn.log_softmax(site_logits.astype(jnp.float32))
        apart = jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0).sum(axis=-1)
        return jnp.where(real, apart, 0).sum() / real.sum()

    by_name = by_site(jax.lax.stop_gradient(found), lens, at_site)
    return jnp.stack([by_name[site] for site in lens.sites])


_divergences = jax.jit(divergences)
