"""What was remembered: latents as arrays, their clusters, ranks and neighbours, and ablations."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np

FEW_POINTS = 20
"""Below, neighbourhoods are no more than noise: `embed_2d` draws a projection instead."""


@dataclasses.dataclass(frozen=True)
class Memories:
    """All memories of some generations, one a row, in the order in which they were recorded.

    Attributes:
        latents: `[M, K, D]` float32.
        valid: `[M, K]` bool, latents that were inserted.
        tag: `[M]` text, of the row that the memory was woven for.
        position: `[M]` float32, new tokens before it as a share of the row's new tokens.
        at_prompt: `[M]` bool, whether it stands before the first new token.
    """

    latents: np.ndarray
    valid: np.ndarray
    tag: np.ndarray
    position: np.ndarray
    at_prompt: np.ndarray

    def means(self) -> np.ndarray:
        """`[M, D]`, see `sequence_means`."""
        return sequence_means(self.latents, self.valid)


class LatentRecorder:
    """Collects what several batches of generation wove and decided; saved as one .npz file.

    Attributes:
        decisions: `[R, T]` int8 of all rows so far: -1 not asked, 0 skipped, 1 invoked.
        count: `[R]` int32 new tokens of each row.
        row_tag: `[R]` text of each row.
    """

    def __init__(self):
        self._memories: list[Memories] = []
        self.decisions = np.zeros((0, 0), np.int8)
        self.count = np.zeros(0, np.int32)
        self.row_tag = np.zeros(0, np.str_)

    def add(
        self,
        latents: np.ndarray,
        written: np.ndarray,
        points: np.ndarray,
        decisions: np.ndarray,
        count: np.ndarray,
        tags: str | Sequence[str],
        valid: np.ndarray | None = None,
    ) -> None:
        """Record one batch, as generation returns it (arrays of jax do too).

        Args:
            latents: `[B, E, K, D]` of each row's events.
            written: `[B, E]` bool, events that happened.
            points: `[B, E]` new tokens before the event; 0 is the event at the prompt.
            decisions: `[B, T]` -1 not asked, 0 asked and skipped, 1 invoked.
            count: `[B]` new tokens of each row.
            tags: a name for each row, such as its task, or one for all.
            valid: `[B, E, K]` bool, latents that an event has; all if not given.

        Raises:
            ValueError: shapes that don't fit each other or earlier batches, or a written event
                outside its row's new tokens.
        """
        latents, written = np.asarray(latents, np.float32), np.asarray(written, bool)
        points, count = np.asarray(points), np.asarray(count, np.int32)
        decisions = np.asarray(decisions, np.int8)
        batch, events, slots, width = latents.shape
        names = np.array([tags] * batch if isinstance(tags, str) else list(tags), np.str_)
        held = np.ones((batch, events, slots), bool) if valid is None else np.asarray(valid, bool)
        wanted = {
            "written": (written.shape, (batch, events)),
            "points": (points.shape, (batch, events)),
            "decisions": (decisions.shape, (batch, *decisions.shape[1:2])),
            "count": (count.shape, (batch,)),
            "tags": (names.shape, (batch,)),
            "valid": (held.shape, (batch, events, slots)),
        }
        for name, (shape, fits) in wanted.items():
            if shape != fits:
                raise ValueError(
                    f"{name} of shape {list(shape)} beside latents of shape "
                    f"{list(latents.shape)}: give {list(fits)}"
                )
        if self._memories and (slots, width) != self._memories[0].latents.shape[1:]:
            known = list(self._memories[0].latents.shape[1:])
            raise ValueError(
                f"latents of [K, D] = {[slots, width]} after others of {known}: record them apart"
            )
        row, event = np.nonzero(written)
        point = points[row, event]
        if ((point < 0) | (point > count[row])).any():
            worst = int(np.argmax((point < 0) | (point > count[row])))
            raise ValueError(
                f"a written event at point {point[worst]} of a row with {count[row[worst]]} new "
                f"tokens: points count new tokens"
            )
        self._memories.append(
            Memories(
                latents[row, event],
                held[row, event],
                names[row],
                (point / np.maximum(count[row], 1)).astype(np.float32),
                point == 0,
            )
        )
        steps = max(self.decisions.shape[1], decisions.shape[1])
        self.decisions = np.concatenate([_widen(self.decisions, steps), _widen(decisions, steps)])
        self.count = np.concatenate([self.count, count])
        self.row_tag = np.concatenate([self.row_tag, names])

    def memories(self) -> Memories:
        """All written events so far."""
        if not self._memories:
            raise ValueError("nothing was recorded: add a batch first")
        fields = [field.name for field in dataclasses.fields(Memories)]
        return Memories(
            **{name: np.concatenate([getattr(m, name) for m in self._memories]) for name in fields}
        )

    def save(self, path: str | Path) -> None:
        """Write everything to an .npz file."""
        np.savez_compressed(
            _npz(path),
            decisions=self.decisions,
            count=self.count,
            row_tag=self.row_tag,
            **vars(self.memories()),
        )

    @classmethod
    def load(cls, path: str | Path) -> "LatentRecorder":
        """Read what `save` wrote; more batches may be added."""
        recorder = cls()
        with np.load(_npz(path), allow_pickle=False) as saved:
            fields = {field.name: saved[field.name] for field in dataclasses.fields(Memories)}
            recorder._memories = [Memories(**fields)]
            recorder.decisions, recorder.count = saved["decisions"], saved["count"]
            recorder.row_tag = saved["row_tag"]
        return recorder


def _widen(decisions: np.ndarray, steps: int) -> np.ndarray:
    return np.pad(decisions, ((0, 0), (0, steps - decisions.shape[1])), constant_values=-1)


def _npz(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: choose a name that ends in .npz")
    return path


def sequence_means(latents: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean latent `[M, D]` of each memory `[M, K, D]` over its valid rows; 0 where none is."""
    weight = np.asarray(valid, np.float32)[..., None]
    return (np.asarray(latents) * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1)


def effective_rank(latents: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`[M]` effective rank of each memory `[M, K, D]`: exp of the entropy of its singular values,
    which sum to 1 (Roy & Vetterli 2007). From 1 (all latents alike) to K; 0 if all are 0.
    """
    shown = np.where(np.asarray(valid)[..., None], latents, 0)
    values = np.linalg.svd(shown.astype(np.float64), compute_uv=False)
    total = values.sum(axis=1, keepdims=True)
    share = values / np.where(total > 0, total, 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
    return np.where(total[:, 0] > 0, np.exp(entropy), 0)


class Clusters(NamedTuple):
    """K-means of mean latents; cluster 0 is the largest.

    Attributes:
        centroids: `[C, D]` float32.
        labels: `[M]` int32.
        silhouette: -1 to 1, high where clusters stand apart and below 0.2 where they hardly do.
    """

    centroids: np.ndarray
    labels: np.ndarray
    silhouette: float


def cluster(means: np.ndarray, clusters: int = 4, seed: int = 0) -> Clusters:
    """K-means of mean latents `[M, D]`. Needs scikit-learn.

    Raises:
        ValueError: no more different points than clusters, or fewer than 2 clusters.
    """
    different = len(np.unique(means, axis=0))
    if not 2 <= clusters < different:
        raise ValueError(
            f"{clusters} clusters of {different} different memories: choose 2 or more, and fewer "
            f"than memories"
        )
    found = _sklearn("cluster").KMeans(clusters, n_init=10, random_state=seed).fit(means)
    silhouette = _sklearn("metrics").silhouette_score(means, found.labels_)
    by_size = np.argsort(-np.bincount(found.labels_, minlength=clusters), kind="stable")
    return Clusters(
        found.cluster_centers_[by_size].astype(np.float32),
        np.argsort(by_size)[found.labels_].astype(np.int32),
        float(silhouette),
    )


def embed_2d(means: np.ndarray, seed: int = 0) -> tuple[np.ndarray, Literal["t-SNE", "PCA"]]:
    """Mean latents `[M, D]` in the plane, `[M, 2]`, and how: t-SNE, or PCA below `FEW_POINTS`.

    Distances between far groups of a t-SNE picture mean nothing. Needs scikit-learn.
    """
    if len(means) < 2 or means.shape[1] < 2:
        raise ValueError(f"means of shape {list(means.shape)}: give two or more of width 2 or more")
    if len(means) < FEW_POINTS:
        return _sklearn("decomposition").PCA(2, svd_solver="full").fit_transform(means), "PCA"
    perplexity = min(30.0, (len(means) - 1) / 3)
    tsne = _sklearn("manifold").TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return tsne.fit_transform(means), "t-SNE"


class Neighbours(NamedTuple):
    """Nearest tokens of `N` latents, nearest first.

    Attributes:
        ids: `[N, k]` int32.
        cosine: `[N, k]` float32. Near 0 the token explains nothing, however near the nearest it is.
        norm_ratio: `[N]` float32, a latent's norm by the mean norm of embeddings.
    """

    ids: np.ndarray
    cosine: np.ndarray
    norm_ratio: np.ndarray


def nearest_tokens(latents: np.ndarray, embedding_table: np.ndarray, k: int = 5) -> Neighbours:
    """Tokens whose embeddings point the way of latents `[N, D]`, by cosine.

    The nearest token always exists, also where latents are far from every embedding: in weights
    that the authors of MemGen published no cosine exceeded 0.1, and latents were 60 times as long
    as embeddings. Read `cosine` and `norm_ratio` before the tokens.

    Args:
        embedding_table: `[V, D]`.
    """
    if not 1 <= k <= len(embedding_table):
        raise ValueError(f"k={k} of {len(embedding_table)} tokens: choose from 1 to all of them")
    table = _directions(embedding_table)
    ids, cosines = [], []
    for start in range(0, len(latents), 256):  # 256 rows of V cosines at once
        cosine = _directions(latents[start : start + 256]) @ table.T
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        ids.append(order.astype(np.int32))
        cosines.append(np.take_along_axis(cosine, order, axis=1))
    length = np.linalg.norm(latents, axis=1) / np.linalg.norm(embedding_table, axis=1).mean()
    return Neighbours(np.concatenate(ids), np.concatenate(cosines), length.astype(np.float32))


def _directions(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


class InvocationHistogram(NamedTuple):
    """How often the trigger was asked and invoked, by tag and position in the response.

    Attributes:
        edges: `[bins + 1]` positions as shares of the response.
        asked, invoked: by tag, `[bins]` int64, sums over its rows.
        rows: by tag, responses.
    """

    edges: np.ndarray
    asked: dict[str, np.ndarray]
    invoked: dict[str, np.ndarray]
    rows: dict[str, int]


def invocation_histogram(
    decisions: np.ndarray, count: np.ndarray, tags: Sequence[str] | np.ndarray, bins: int = 20
) -> InvocationHistogram:
    """Decisions by their place among the row's new tokens: decision j of n falls at j/n.

    Args:
        decisions, count, tags: of `LatentRecorder` (`decisions`, `count`, `row_tag`).
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: choose 1 or more")
    step = np.arange(decisions.shape[1])
    inside = step < count[:, None]
    place = step * bins // np.maximum(count[:, None], 1)
    asked, invoked, rows = {}, {}, {}
    for tag in sorted(set(map(str, tags))):
        of_tag = (np.asarray(tags) == tag)[:, None] & inside
        for counts, these in ((asked, decisions >= 0), (invoked, decisions == 1)):
            counts[tag] = np.bincount(place[of_tag & these], minlength=bins)
        rows[tag] = int((np.asarray(tags) == tag).sum())
    return InvocationHistogram(np.linspace(0, 1, bins + 1), asked, invoked, rows)


class CenterDistance(NamedTuple):
    """Mean distance between centers of two kinds, pair by pair.

    Attributes:
        euclidean: as in the paper; where one kind is much longer it measures its length.
        cosine: 1 minus the cosine, blind to length.
        whitened: Euclidean after whitening by the covariance of all centers together, so that no
            direction counts more for being wide.
    """

    euclidean: float
    cosine: float
    whitened: float


def center_distances(centers: Mapping[str, np.ndarray]) -> dict[tuple[str, str], CenterDistance]:
    """Distances of every pair of kinds, such as latents, context, and a replayed success.

    The covariance is shrunk (Ledoit & Wolf 2004): centers are fewer than dimensions. Needs
    scikit-learn.

    Args:
        centers: by kind, `[M, D]` means of the same M invocations in the same order.
    """
    shapes = {name: list(np.shape(rows)) for name, rows in centers.items()}
    if len(centers) < 2 or len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"centers of shapes {shapes}: give two or more kinds of one shape [M, D]")
    kinds = {name: np.asarray(rows, np.float64) for name, rows in centers.items()}
    everything = np.concatenate(list(kinds.values()))
    precision = _sklearn("covariance").LedoitWolf().fit(everything).precision_
    names, found = list(kinds), {}
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            gap = kinds[first] - kinds[second]
            cosine = (_directions(kinds[first]) * _directions(kinds[second])).sum(axis=1)
            found[first, second] = CenterDistance(
                float(np.linalg.norm(gap, axis=1).mean()),
                float((1 - cosine).mean()),
                float(np.sqrt(np.einsum("md,de,me->m", gap, precision, gap)).mean()),
            )
    return found


def _sklearn(part: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError as error:
        raise ValueError(
            'this analysis needs scikit-learn: pip install "thoughtbubbles[memgen]"'
        ) from error
