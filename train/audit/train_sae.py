"""Train a sparse autoencoder on the activations of a model's site: thoughtbubbles audit sae"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.sites import capture
from train.audit.sae import (
    SAETraining,
    SparseAutoencoder,
    init_sae,
    nearest_tokens,
)
from train.audit.stored import read_stored, save_stored
from train.audit.texts import (
    activation_at,
    check_site,
    held_out_batches,
    open_texts,
    token_text,
    training_batches,
)
from train.cli.numbers import check_least
from train.data import PackedData
from train.models.load import LanguageModel, check_named, load_named
from train.runs.files import new_folder, write_atomically

KIND = "sparse autoencoder"
EXAMPLES, CONTEXT = 3, 8  # number of example texts of a feature, and of tokens of each text
LARGEST_LINES = 4096  # maximum number of features that are described

Streams = Literal["all", "roots", "forks"]


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """Trains a TopK sparse autoencoder on a site's activations, and describes its features.

    Attributes:
        checkpoint: Run folder, or the folder of one of its steps.
        model: Pretrained weights in place of a checkpoint: "smollm2", a Hugging Face folder, or a
            .gguf file.
        corpus: Corpus on which activations are computed; by default the corpus of the run.
        seq_len: Number of tokens per row; by default as in the run, or 256 without a run.
        site: Name of the site, e.g. block_3; the block in the middle by default.
        streams: Streams of a forking model whose activations are used: "roots", "forks", or "all".
            With "all", densities count the activations of roots and forks together.
        features: Number of features; by default 16 times the width of the activations.
        k: Maximum number of active features of an activation.
        tokens: Number of activations to train on.
        batch_size: Number of activations per step.
        rows: Number of rows of a forward pass.
        buffer: Number of activations in the buffer that shuffles them.
        learning_rate: Learning rate of Adam; 2e-4 / sqrt(features / 2^14) by default.
        aux_weight: Weight of the loss that revives dead features (AuxK).
        dead_after: Number of activations after which an inactive feature counts as dead; by
            default a tenth of `tokens`, but at least ten batches.
        held_out: Number of held-out rows for the metrics.
        seed: Seed of the initial directions, of the rows' order and of the buffer.
        out: New folder for the autoencoder, its metrics and its features.
    """

    checkpoint: str | None = None
    model: str | None = None
    corpus: str | None = None
    seq_len: int | None = None
    site: str | None = None
    streams: Streams = "roots"
    features: int | None = None
    k: int = 32
    tokens: int = 1_000_000
    batch_size: int = 2048
    rows: int = 16
    buffer: int = 1 << 17
    learning_rate: float | None = None
    aux_weight: float = 1 / 32
    dead_after: int | None = None
    held_out: int = 64
    seed: int = 0
    out: str = "runs/sae"

    def __post_init__(self):
        check_named(self.checkpoint, self.model)
        check_least(self, features=1, k=1, batch_size=2, rows=1, held_out=1, seq_len=2)
        check_least(self, dead_after=1, aux_weight=0)
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: choose more than 0")
        if self.tokens < self.batch_size:
            raise ValueError(
                f"tokens={self.tokens} are less than a batch of {self.batch_size}: choose more"
            )
        if self.buffer < 2 * self.batch_size:
            raise ValueError(
                f"buffer={self.buffer} can't shuffle batches of {self.batch_size}: choose twice it"
            )
        before_last = (self.tokens // self.batch_size - 1) * self.batch_size
        if self.aux_weight > 0 and self.dead_after is not None and self.dead_after > before_last:
            raise ValueError(
                f"dead_after={self.dead_after} of tokens={self.tokens}: no feature would count as "
                "dead in time to be revived, choose fewer, or aux_weight=0"
            )


def dead_after(config: SAEConfig) -> int:
    """Return the number of activations after which an inactive feature counts as dead."""
    if config.dead_after is not None:
        return config.dead_after
    return max(config.tokens // 10, 10 * config.batch_size)


def main(config: SAEConfig) -> None:
    """Train an autoencoder, write it with its metrics and features, and print the metrics."""
    out = new_folder(config.out)
    lm = load_named(config.checkpoint, config.model)
    site = check_site(lm, config.site)
    model: Any = lm.model
    if site not in model.sites:
        raise ValueError(
            f"site={site!r}: neurons are sparse and positive already and need no autoencoder, read "
            f"them by thoughtbubbles.lens.capture, or choose from {', '.join(model.sites)}"
        )
    data = open_texts(lm, config.corpus, config.seq_len)
    sae = train(config, lm, data, site)
    batches = list(held_out_batches(data, config.rows, config.held_out))
    metrics, statistics = measure(sae, lm, batches, site, config.streams)
    meta = {
        "site": site,
        "streams": config.streams,
        "k": sae.k,
        "of": config.checkpoint or config.model,
        "metrics": metrics,
    }
    leaves = {name: getattr(sae, name) for name in _LEAVES} | {"density": statistics.density}
    save_stored(out, KIND, leaves, meta)
    lines = [json.dumps(line) for line in describe(sae, lm, statistics)]
    write_atomically(out / "features.jsonl", "\n".join(lines) + "\n")
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(", ".join(f"{name} {_shown(value)}" for name, value in metrics.items()))
    print(f"features: {(out / 'features.jsonl').absolute()}")


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


_LEAVES = ("encoder", "encoder_bias", "decoder", "bias", "norm")


def load_sae(folder: str | Path) -> tuple[SparseAutoencoder, np.ndarray, dict[str, Any]]:
    """Load an autoencoder that `audit sae` has trained.

    Returns:
        Autoencoder; density of its `F` features, `[F]` float32; and metadata with the entries
        `site`, `streams`, `k`, `of` (checkpoint or pretrained weights of the model) and `metrics`.

    Raises:
        ValueError: The folder holds no autoencoder, or a damaged one.
    """
    meta, leaves = read_stored(folder, KIND, (*_LEAVES, "density"))
    parts: dict[str, Any] = {name: jnp.asarray(leaves[name]) for name in _LEAVES}
    return SparseAutoencoder(**parts, k=meta["k"]), np.asarray(leaves["density"]), meta


def train(config: SAEConfig, lm: LanguageModel, data: PackedData, site: str) -> SparseAutoencoder:
    """Train an autoencoder on activations of training rows at a site.

    Raises:
        ValueError: All activations of a batch are equal or 0, `k` exceeds the number of features,
            or the rows have no activation of the chosen streams.
    """
    stream = shuffled(activations(config, lm, data, site), config)
    first = next(stream)
    count = config.features or 16 * first.shape[1]
    sae = init_sae(first, count, config.k, config.seed)
    rate = config.learning_rate or 2e-4 / (count / 2**14) ** 0.5
    training = SAETraining(rate, config.aux_weight, dead_after(config))
    step = jax.jit(training.step, donate_argnums=0)
    state, steps = training.start(sae), config.tokens // config.batch_size
    batch: np.ndarray = first
    for number in range(steps):
        if (batch == batch[0]).all():
            raise ValueError(
                f"{site}: the {len(batch)} activations of step {number + 1} are all equal, so they "
                "have no variance to explain: choose another site or corpus"
            )
        state, metrics = step(state, batch)
        if (number + 1) % max(steps // 10, 1) == 0:
            shown = "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
            print(f"step {number + 1} of {steps}  {shown}")
        if number + 1 < steps:
            batch = next(stream)
    return state.sae


def activations(
    config: SAEConfig, lm: LanguageModel, data: PackedData, site: str
) -> Iterator[np.ndarray]:
    """Yield the activations `[N, D]` of the chosen streams in each batch of training rows.

    Raises:
        ValueError: A hundred consecutive batches have no activation of the chosen streams.
    """
    empty = 0
    for rows in training_batches(data, config.rows, config.seed):
        x = chosen(activation_at(lm.model, rows, site), config.streams)[0]
        empty = 0 if len(x) else empty + 1
        if empty == 100:
            raise ValueError(
                f"streams={config.streams!r}: {site} has none in {100 * config.rows} rows: choose "
                "roots, or a site behind a fork layer"
            )
        yield x


def chosen(found: Any, streams: Streams) -> tuple[np.ndarray, np.ndarray]:
    """Select the activations of the chosen streams, except activations of each row's first token.

    The norm of a first token's activation differs greatly from the norms at other tokens.

    Args:
        found: `Activation` of a site.
        streams: Streams to select.

    Returns:
        The `N` selected activations, `[N, D]`, and the row and slot of each, `[N, 2]`.
    """
    select = np.asarray(selected(found, streams))
    return np.asarray(found.x)[select], np.argwhere(select)


def selected(found: Any, streams: Streams) -> Any:
    """Return which slots `chosen` selects, `[B, S]` bool: live, and not of the first token."""
    which = {"all": found.depth >= 0, "roots": found.depth == 0, "forks": found.depth > 0}
    return which[streams] & found.alive & (found.token > 0)


def shuffled(stream: Iterator[np.ndarray], config: SAEConfig) -> Iterator[np.ndarray]:
    """Yield shuffled batches `[batch_size, D]` from a buffer, refilled whenever half is used."""
    rng = np.random.default_rng(config.seed)
    size = min(config.buffer, max(config.tokens, 2 * config.batch_size))
    kept: list[np.ndarray] = []
    while True:
        count = sum(map(len, kept))
        while count < size:
            kept.append(next(stream))
            count += len(kept[-1])
        pool = rng.permutation(np.concatenate(kept))
        whole = max(len(pool) // 2 // config.batch_size, 1) * config.batch_size
        yield from pool[:whole].reshape(-1, config.batch_size, pool.shape[1])
        kept = [pool[whole:]]


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of features on held-out rows.

    Attributes:
        density: `[F]` float32, fraction of activations in which each feature is active.
        mean: `[F]` float64, mean value of each feature where it is active; 0 if it never is.
        contexts: For each feature, up to three texts, each of which ends with a token at which the
            feature is largest.
    """

    density: np.ndarray
    mean: np.ndarray
    contexts: list[list[str]]


def measure(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    batches: list[np.ndarray],
    site: str,
    streams: Streams,
) -> tuple[dict[str, float | None], FeatureStatistics]:
    """Measure an autoencoder and its features on held-out rows.

    Args:
        sae: Autoencoder.
        lm: Model with its tokenizer.
        batches: Rows `[B, T + 1]` int32, -1 for padding.
        site: Name of the site.
        streams: Streams whose activations are measured, and reconstructed in `loss_recovered`.

    Returns:
        Metrics by name, and the statistics of the features. The metrics are "fvu" (fraction of
        variance unexplained), "l0" (mean number of active features of an activation), "dead"
        (fraction of features that are never active), "activations" (number of activations), and the
        losses of `loss_recovered`; an undefined metric is None.

    Raises:
        ValueError: The rows have no activation of the chosen streams.
    """
    count = sae.encoder_bias.shape[0]
    hits, total = np.zeros(count, np.int64), np.zeros(count)
    best: list[list[tuple[float, str]]] = [[] for _ in range(count)]
    seen, rest, sums, squares = 0, 0.0, np.zeros(sae.bias.shape), 0.0
    features_of, reconstruct = jax.jit(SparseAutoencoder.features), jax.jit(_explained)
    for rows in batches:
        found = jax.device_get(activation_at(lm.model, rows[:, :-1], site))
        x, where = chosen(found, streams)
        if not len(x):
            continue
        value, index = map(np.asarray, features_of(sae, x))
        seen, sums = seen + len(x), sums + x.sum(axis=0, dtype=np.float64)
        squares += np.square(x.astype(np.float64)).sum()
        rest += float(reconstruct(sae, x))
        live = value > 0
        np.add.at(hits, index[live], 1)
        np.add.at(total, index[live], value[live])
        _keep_best(best, value, index, where, found.token, rows, lm)
    if not seen:
        raise ValueError(f"streams={streams!r}: {site} has none in the held-out rows")
    variance = squares - np.square(sums).sum() / seen
    metrics: dict[str, float | None] = {
        "fvu": float(rest / variance) if variance > 0 else None,
        "l0": float(hits.sum() / seen),
        "dead": float((hits == 0).mean()),
        "activations": float(seen),
        **loss_recovered(sae, lm, batches, site, streams),
    }
    contexts = [[text for _, text in texts] for texts in best]
    mean = total / np.maximum(hits, 1)
    statistics = FeatureStatistics((hits / seen).astype(np.float32), mean, contexts)
    return metrics, statistics


def _explained(sae: SparseAutoencoder, x: jax.Array) -> jax.Array:
    return jnp.square(x.astype(jnp.float32) - sae.reconstruct(x)).sum()


def _keep_best(best, value, index, where, token, rows, lm: LanguageModel) -> None:
    """Update the up to three texts of each feature, which end where the feature is largest."""
    # By feature, and by value within a feature.
    order = np.lexsort((-value.ravel(), index.ravel()))
    of = index.ravel()[order]
    rank = np.arange(len(of)) - np.searchsorted(of, of)
    for at in order[rank < EXAMPLES]:
        number, feature = at // value.shape[1], index.flat[at]
        texts = best[feature]
        if value.flat[at] <= 0 or (len(texts) == EXAMPLES and value.flat[at] <= texts[-1][0]):
            continue
        row, slot = where[number]
        here = token[row, slot]
        text = lm.tokenizer.decode(rows[row, max(here - CONTEXT + 1, 0) : here + 1].tolist())
        texts.append((float(value.flat[at]), text))
        texts.sort(key=lambda pair: -pair[0])
        del texts[EXAMPLES:]


def loss_recovered(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    batches: list[np.ndarray],
    site: str,
    streams: Streams,
) -> dict[str, float | None]:
    """Compute the model's loss with a site's activations unchanged, reconstructed, and zero.

    Returns:
        Losses in nats per token: `loss` with unchanged activations, `loss_sae` with reconstructed
        activations, `loss_zero` with activations of zero. Also `loss_recovered`,
        `(loss_zero - loss_sae) / (loss_zero - loss)`, or None if `loss_zero` equals `loss`.
    """
    model: Any = lm.model

    @jax.jit
    def nats(model: Any, sae: SparseAutoencoder, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens, targets = jnp.maximum(rows[:, :-1], 0), rows[:, 1:]
        mask = rows[:, :-1] >= 0
        clean, found = capture(model, tokens, mask, sites=(site,))
        # Rows are padded on the right, so slots of `found` are also the slots that edits get.
        select = selected(found[site], streams)[..., None]
        edits = (
            lambda x: jnp.where(select, sae.reconstruct(x), x),
            lambda x: jnp.where(select, jnp.zeros_like(x), x),
        )
        logits = [
            clean,
            *(capture(model, tokens, mask, sites=(), edit={site: e})[0] for e in edits),
        ]
        real = targets >= 0

        def total(logits: jax.Array) -> jax.Array:
            log_prob = jax.nn.log_softmax(logits)
            at = jnp.take_along_axis(log_prob, jnp.maximum(targets, 0)[..., None], axis=-1)
            return -jnp.where(real, at[..., 0], 0).sum()

        return jnp.stack([total(each) for each in logits]), real.sum()

    sums, count = np.zeros(3), 0
    for rows in batches:
        found, number = nats(model, sae, jnp.asarray(rows))
        sums, count = sums + np.asarray(found), count + int(number)
    clean, with_sae, zero = (sums / max(count, 1)).tolist()
    recovered = (zero - with_sae) / (zero - clean) if zero != clean else None
    return {
        "loss": clean, "loss_sae": with_sae, "loss_zero": zero, "loss_recovered": recovered,
    }  # fmt: skip


def describe(
    sae: SparseAutoencoder, lm: LanguageModel, statistics: FeatureStatistics
) -> Iterator[dict[str, Any]]:
    """Yield a description of each of the up to 4096 densest active features, the densest first.

    A description has the entries `feature` (index), `density`, `mean`, `examples` (texts), and
    `tokens`: the tokens whose embeddings have the largest dot product with the feature's decoder
    row (arXiv 2510.01070), or none if the site's width is not that of the embeddings.
    """
    model: Any = lm.model
    order = np.argsort(-statistics.density, kind="stable")
    order = order[statistics.density[order] > 0][:LARGEST_LINES]
    near = np.zeros((len(order), 0), int)
    if sae.bias.shape[0] == model.embed_dim and len(order):
        table = model.embed_tokens(jnp.arange(model.vocab_size))
        top = min(20, model.vocab_size)
        near = np.asarray(nearest_tokens(sae, table, jnp.asarray(order), top))
    for feature, ids in zip(order, near, strict=True):
        yield {
            "feature": int(feature),
            "density": float(statistics.density[feature]),
            "mean": float(statistics.mean[feature]),
            "tokens": [token_text(lm, int(id_)) for id_ in ids],
            "examples": statistics.contexts[feature],
        }
