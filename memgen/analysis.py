"""Analysis of latent memory: record latents; compute clusters, ranks and nearest tokens."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from memgen.response import NO_DECISION, Response
from memgen.short_repr import ShortRepr, short_repr

FEW_POINTS = 20
"""Minimum number of points for t-SNE; `embed_2d` projects fewer points with PCA instead."""


@dataclasses.dataclass(frozen=True, repr=False)
class Memories(ShortRepr):
    """Memories recorded from generated responses, in the order of recording.

    A memory is the group of up to `K` latents that one event inserts. `M` is the number of
    memories.

    Attributes:
        latents: `[M, K, D]` float32 latents.
        valid: `[M, K]` bool, True for latents that were inserted, False for unused slots. The event
            before the first token and later events may insert different numbers of latents.
        tag: `[M]` strings, tag of the row that each memory belongs to.
        position: `[M]` float32, fraction of the row's new tokens that precede each memory.
        at_prompt: `[M]` bool, True for memories that precede the row's first new token.
    """

    latents: np.ndarray
    valid: np.ndarray
    tag: np.ndarray
    position: np.ndarray
    at_prompt: np.ndarray

    def means(self) -> np.ndarray:
        """Return the mean `[M, D]` of each memory's valid latents."""
        return sequence_means(self.latents, self.valid)


class LatentRecorder:
    """Recorder of latents and trigger decisions over several batches, with `save` and `load`.

    `R` is the number of rows recorded so far, `T` the maximum number of new tokens per row.

    Attributes:
        decisions: `[R, T]` int8, decision before each new token: -1 none, 0 skipped, 1 invoked.
            Shorter batches are padded with -1.
        count: `[R]` int32, number of new tokens in each row.
        row_tag: `[R]` strings, tag of each row.
    """

    def __init__(self):
        self._memories: list[Memories] = []
        self.decisions = np.zeros((0, 0), np.int8)
        self.count = np.zeros(0, np.int32)
        self.row_tag = np.zeros(0, np.str_)

    def add(self, response: Response, tags: str | Sequence[str]) -> None:
        """Record the latents and decisions of one batch of responses.

        Args:
            response: Response of the batch. A latent of zeros counts as an unused slot.
            tags: Tag of each row, such as the name of the row's task, or one tag for all rows.

        Raises:
            ValueError: There is not one tag for each row, or the latents differ from those recorded
                before in their number of slots or their width.
        """
        latents, points = np.asarray(response.latents, np.float32), np.asarray(response.points)
        count, decisions = np.asarray(response.count), np.asarray(response.decisions)
        names = np.array([tags] * len(count) if isinstance(tags, str) else list(tags), np.str_)
        if names.shape != count.shape:
            raise ValueError(
                f"{names.size} tags for {count.size} rows: give one for each, or a single string"
            )
        if self._memories and latents.shape[2:] != self._memories[0].latents.shape[1:]:
            raise ValueError(
                f"latents [K, D] of shape {list(latents.shape[2:])} after others of shape "
                f"{list(self._memories[0].latents.shape[1:])}: record them apart"
            )
        row, event = np.nonzero(points >= 0)
        kept, point = latents[row, event], points[row, event]
        position = (point / np.maximum(count[row], 1)).astype(np.float32)
        self._memories.append(
            Memories(kept, (kept != 0).any(axis=2), names[row], position, point == 0)
        )
        steps = max(self.decisions.shape[1], decisions.shape[1])
        self.decisions = np.concatenate([_widen(self.decisions, steps), _widen(decisions, steps)])
        self.count = np.concatenate([self.count, count])
        self.row_tag = np.concatenate([self.row_tag, names])

    def memories(self) -> Memories:
        """Return all memories recorded so far; raise a ValueError if there is no batch yet."""
        if not self._memories:
            raise ValueError("nothing was recorded: add a batch first")
        fields = [field.name for field in dataclasses.fields(Memories)]
        return Memories(
            **{name: np.concatenate([getattr(m, name) for m in self._memories]) for name in fields}
        )

    def save(self, path: str | Path) -> None:
        """Write all records to an .npz file, atomically: a reader sees the old file or the new one.

        Raises:
            ValueError: Nothing was recorded, or the file name does not end in .npz.
        """
        path, memories = _npz(path), vars(self.memories())
        records = {"decisions": self.decisions, "count": self.count, "row_tag": self.row_tag}
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **records, **memories)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> "LatentRecorder":
        """Load a recorder from a file that `save` wrote; the recorder accepts further batches.

        Raises:
            ValueError: The file name does not end in .npz, or the file holds no recorded latents.
        """
        recorder = cls()
        with np.load(_npz(path), allow_pickle=False) as saved:
            names = [field.name for field in dataclasses.fields(Memories)]
            if not {*names, "decisions", "count", "row_tag"} <= set(saved.files):
                raise ValueError(f"{path} holds {saved.files}: choose a file of recorded latents")
            recorder._memories = [Memories(**{name: saved[name] for name in names})]
            recorder.decisions, recorder.count = saved["decisions"], saved["count"]
            recorder.row_tag = saved["row_tag"]
        return recorder


def _widen(decisions: np.ndarray, steps: int) -> np.ndarray:
    return np.pad(decisions, ((0, 0), (0, steps - decisions.shape[1])), constant_values=NO_DECISION)


def _npz(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: choose a name that ends in .npz")
    return path


def sequence_means(latents: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Average the valid latents of each memory.

    Args:
        latents: `[M, K, D]` latents of `M` memories with `K` latent slots each.
        valid: `[M, K]` bool, True for real latents and False for unused slots.

    Returns:
        Means `[M, D]`; zeros for a memory without valid latents.
    """
    weight = np.asarray(valid, np.float32)[..., None]
    return (np.asarray(latents) * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1)


def effective_rank(latents: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Compute the effective rank of each memory's latents (Roy & Vetterli 2007).

    The singular values of a memory's valid latents are normalised to sum 1; the effective rank is
    the exponential of their entropy. The effective rank ranges from 1 (all latents are multiples of
    one vector) to `K`, and is 0 if all latents are 0.

    Args:
        latents: `[M, K, D]` latents of `M` memories with `K` latent slots each.
        valid: `[M, K]` bool, True for real latents and False for unused slots.

    Returns:
        Effective ranks `[M]`.
    """
    shown = np.where(np.asarray(valid)[..., None], latents, 0)
    values = np.linalg.svd(shown.astype(np.float64), compute_uv=False)
    total = values.sum(axis=1, keepdims=True)
    share = values / np.where(total > 0, total, 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
    return np.where(total[:, 0] > 0, np.exp(entropy), 0)


class Clusters(NamedTuple):
    """K-means clusters of the mean latents of `M` memories, largest cluster first.

    Attributes:
        centroids: `[C, D]` float32 centroids of the `C` clusters.
        labels: `[M]` int32, cluster of each memory.
        silhouette: Silhouette score, from -1 to 1. Below 0.2 the clusters are hardly separated.
    """

    centroids: np.ndarray
    labels: np.ndarray
    silhouette: float

    __repr__ = short_repr


def cluster(means: np.ndarray, clusters: int = 4, seed: int = 0) -> Clusters:
    """Cluster mean latents with k-means. Needs scikit-learn.

    Args:
        means: `[M, D]` mean latents of `M` memories (`sequence_means`).
        clusters: Number of clusters.
        seed: Seed of the initial centroids.

    Raises:
        ValueError: `clusters` is below 2 or not below the number of distinct means, or
            scikit-learn is missing.
    """
    different = len(np.unique(means, axis=0))
    if not 2 <= clusters < different:
        raise ValueError(
            f"{clusters} clusters of {different} different memories: choose 2 or more, and fewer "
            f"than memories"
        )
    kmeans = _sklearn("cluster").KMeans(clusters, n_init=10, random_state=seed)
    with _one_thread():
        found = kmeans.fit(means)
        silhouette = _sklearn("metrics").silhouette_score(means, found.labels_)
    by_size = np.argsort(-np.bincount(found.labels_, minlength=clusters), kind="stable")
    return Clusters(
        found.cluster_centers_[by_size].astype(np.float32),
        np.argsort(by_size)[found.labels_].astype(np.int32),
        float(silhouette),
    )


def embed_2d(means: np.ndarray, seed: int = 0) -> tuple[np.ndarray, Literal["t-SNE", "PCA"]]:
    """Embed mean latents in two dimensions, for a scatter plot. Needs scikit-learn.

    In a t-SNE embedding, distances between groups that are far apart have no meaning.

    Args:
        means: `[M, D]` mean latents of `M` memories (`sequence_means`).
        seed: Seed of t-SNE.

    Returns:
        Points `[M, 2]`, and the name of the embedding method: "PCA" for fewer than `FEW_POINTS`
        means, else "t-SNE".

    Raises:
        ValueError: There are fewer than two means, their width is below 2, or scikit-learn is
            missing.
    """
    if len(means) < 2 or means.shape[1] < 2:
        raise ValueError(f"means of shape {list(means.shape)}: give two or more of width 2 or more")
    if len(means) < FEW_POINTS:
        return _sklearn("decomposition").PCA(2, svd_solver="full").fit_transform(means), "PCA"
    perplexity = min(30.0, (len(means) - 1) / 3)
    tsne = _sklearn("manifold").TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    with _one_thread():
        return tsne.fit_transform(means), "t-SNE"


class Neighbours(NamedTuple):
    """The `k` nearest tokens of each of `N` latents, in decreasing order of cosine similarity.

    Attributes:
        ids: `[N, k]` int32 token ids.
        cosine: `[N, k]` float32 cosine similarities. A token with a cosine near 0 does not explain
            its latent.
        norm_ratio: `[N]` float32, norm of each latent divided by the mean norm of token embeddings.
    """

    ids: np.ndarray
    cosine: np.ndarray
    norm_ratio: np.ndarray

    __repr__ = short_repr


def nearest_tokens(latents: np.ndarray, embedding_table: np.ndarray, k: int = 5) -> Neighbours:
    """Find the tokens whose embeddings have the highest cosine similarity to each latent.

    A nearest token exists even for a latent that is far from every embedding. In the checkpoint
    that MemGen's authors published, no cosine exceeds 0.1, and the norm of latents is 60 times that
    of embeddings. Check `cosine` and `norm_ratio` before interpreting the tokens.

    Args:
        latents: `[N, D]` latents.
        embedding_table: `[V, D]` token embeddings of the reasoner.
        k: Number of tokens to find for each latent.

    Raises:
        ValueError: `k` is below 1 or above `V`.
    """
    if not 1 <= k <= len(embedding_table):
        raise ValueError(f"k={k} of {len(embedding_table)} tokens: choose from 1 to all of them")
    latents, table = np.asarray(latents, np.float32), np.asarray(embedding_table, np.float32)
    directions = unit_rows(table)
    ids, cosines = [], []
    for start in range(0, max(len(latents), 1), 256):  # 256 rows of V cosines at once
        cosine = unit_rows(latents[start : start + 256]) @ directions.T
        best = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        found = np.take_along_axis(cosine, best, axis=1)
        order = np.argsort(-found, axis=1)
        ids.append(np.take_along_axis(best, order, axis=1).astype(np.int32))
        cosines.append(np.take_along_axis(found, order, axis=1))
    length = np.linalg.norm(latents, axis=1) / np.linalg.norm(table, axis=1).mean()
    return Neighbours(np.concatenate(ids), np.concatenate(cosines), length.astype(np.float32))


class InvocationHistogram(NamedTuple):
    """Histogram of the trigger's decisions over positions in the response, for each tag.

    Attributes:
        edges: `[bins + 1]` edges of the bins, as fractions of the response's length.
        queried: Mapping from a tag to the number of decisions (to skip or to invoke) in each bin,
            `[bins]` int64.
        invoked: Mapping from a tag to the number of decisions to invoke the weaver in each bin,
            `[bins]` int64.
        rows: Mapping from a tag to the number of responses with the tag.
    """

    edges: np.ndarray
    queried: dict[str, np.ndarray]
    invoked: dict[str, np.ndarray]
    rows: dict[str, int]

    __repr__ = short_repr


def invocation_histogram(
    decisions: np.ndarray, count: np.ndarray, tags: Sequence[str] | np.ndarray, bins: int = 20
) -> InvocationHistogram:
    """Count the trigger's decisions by relative position in the response, for each tag.

    The decision before token `j` of a response of `n` tokens has the position `j / n`.

    Args:
        decisions: `[R, T]` int8 decisions of `R` rows (`LatentRecorder.decisions`).
        count: `[R]` int32, number of new tokens in each row (`LatentRecorder.count`).
        tags: `[R]` tag of each row (`LatentRecorder.row_tag`).
        bins: Number of equally wide bins.

    Raises:
        ValueError: `bins` is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: choose 1 or more")
    step = np.arange(decisions.shape[1])
    inside = step < count[:, None]
    in_bin = step * bins // np.maximum(count[:, None], 1)
    queried, invoked, rows = {}, {}, {}
    for tag in sorted(set(map(str, tags))):
        of_tag = (np.asarray(tags) == tag)[:, None] & inside
        for counts, these in ((queried, decisions >= 0), (invoked, decisions == 1)):
            counts[tag] = np.bincount(in_bin[of_tag & these], minlength=bins)
        rows[tag] = int((np.asarray(tags) == tag).sum())
    return InvocationHistogram(np.linspace(0, 1, bins + 1), queried, invoked, rows)


class CenterDistance(NamedTuple):
    """Distances between the centers of two kinds of vectors, averaged over invocations.

    Attributes:
        euclidean: Euclidean distance, as in the paper. If the centers of one kind have a much
            larger norm than those of the other kind, the distance mostly measures norms.
        cosine: Cosine distance (1 minus the cosine), which does not depend on norms. The distance
            is small whenever the two centers have a common direction.
        whitened: Mahalanobis distance of the centers scaled to norm 1, under the covariance of the
            scaled centers of all kinds. The distance depends neither on norms nor on a direction
            that all centers have in common.
    """

    euclidean: float
    cosine: float
    whitened: float


def center_distances(centers: Mapping[str, np.ndarray]) -> dict[tuple[str, str], CenterDistance]:
    """Measure the distances between the centers of each pair of kinds of vectors.

    Kinds are, for example, latents and context vectors. Distances are averaged over invocations of
    the weaver. The covariance matrix of `CenterDistance.whitened` is a shrinkage estimate (Ledoit &
    Wolf 2004), because there may be fewer centers than dimensions. Needs scikit-learn.

    Args:
        centers: Mapping from the name of a kind to its centers, `[M, D]`: row `m` is the mean of
            the kind's vectors at invocation `m`. All kinds have the same `M` invocations in the
            same order.

    Returns:
        Dict from each pair of names, in the order of `centers`, to the distances of the pair.

    Raises:
        ValueError: There are fewer than two kinds, their shapes differ, or scikit-learn is missing.
    """
    shapes = {name: list(np.shape(rows)) for name, rows in centers.items()}
    if len(centers) < 2 or len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"centers of shapes {shapes}: give two or more kinds of one shape [M, D]")
    kinds = {name: np.asarray(rows, np.float64) for name, rows in centers.items()}
    unit = {name: unit_rows(rows) for name, rows in kinds.items()}
    precision = _sklearn("covariance").LedoitWolf().fit(np.concatenate([*unit.values()])).precision_
    names, found = list(kinds), {}
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            gap = unit[first] - unit[second]
            found[first, second] = CenterDistance(
                float(np.linalg.norm(kinds[first] - kinds[second], axis=1).mean()),
                float((1 - (unit[first] * unit[second]).sum(axis=1)).mean()),
                float(np.sqrt((gap @ precision * gap).sum(axis=1)).mean()),
            )
    return found


def unit_rows(rows: Any) -> Any:
    """Scale the vectors on the last axis of a NumPy or JAX array to norm 1; zeros stay zeros."""
    return rows / ((rows * rows).sum(axis=-1, keepdims=True) ** 0.5).clip(1e-30)


def _one_thread() -> Any:
    """Return a context manager that limits OpenMP to one thread.

    On busy cores, spinning OpenMP threads would take minutes.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    return threadpool_limits(1)


def _sklearn(part: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError as error:
        raise ValueError(
            'this analysis needs scikit-learn: pip install "thoughtbubbles[memgen]"'
        ) from error
