"""Analyses of memory on arrays whose answer is known, ablations inside jit, and the figures."""

import io
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib.text import Text
from memgen_tiny import CONFIG, answer, in_numpy, rollout

from memgen import decoding as loop_module
from memgen.ablation import ClusterAblation, CountMatchedControl
from memgen.analysis import (
    Clusters,
    LatentRecorder,
    center_distances,
    cluster,
    effective_rank,
    embed_2d,
    invocation_histogram,
    nearest_tokens,
    sequence_means,
)
from memgen.continual import ContinualReport
from memgen.figures import (
    ablation_figure,
    clusters_figure,
    continual_figure,
    distances_figure,
    invocations_figure,
    nearest_figure,
    ranks_figure,
)
from memgen.response import Response
from memgen.trigger import AlwaysInvoke, NeverInvoke


def response(points, decisions, count, *, slots: int = 2, width: int = 3, seed: int = 0):
    """What generation returns: latents at points >= 0, zeros elsewhere."""
    points, decisions = np.array(points, np.int32), np.array(decisions, np.int8)
    draw = np.random.default_rng(seed).normal(size=(*points.shape, slots, width))
    latents = np.where((points >= 0)[..., None, None], draw, 0).astype(np.float32)
    blank = np.zeros(decisions.shape, np.float32)
    arrays: Any = blank, np.array(count, np.int32), blank, decisions, latents, points
    return Response(*arrays)


def recorded() -> tuple[LatentRecorder, list[Response]]:
    batches = [
        response([[0, 3], [-1, 2], [-1, -1]], [[1, -1, -1, 1], [0, -1, 1, 0], [0, 0, -1, -1]],
                 [4, 4, 2]),
        response([[0, 1]], [[1, 1]], [2], seed=1),
    ]  # fmt: skip
    recorder = LatentRecorder()
    recorder.add(batches[0], ["sums", "words", "sums"])
    recorder.add(batches[1], "words")
    return recorder, batches


def test_recorder_keeps_written_events_with_their_rows():
    recorder, (first, second) = recorded()
    found = recorder.memories()
    assert found.tag.tolist() == ["sums", "sums", "words", "words", "words"]
    assert found.position.tolist() == [0, 0.75, 0.5, 0, 0.5]
    assert found.at_prompt.tolist() == [True, False, False, True, False]
    expected = [first.latents[0, 0], first.latents[0, 1], first.latents[1, 1], *second.latents[0]]
    np.testing.assert_array_equal(found.latents, np.stack(expected))
    assert found.valid.all()
    assert recorder.decisions.tolist()[3] == [1, 1, -1, -1]  # not asked beyond its batch's width
    assert recorder.row_tag.tolist() == ["sums", "words", "sums", "words"]


def test_recorder_leaves_out_slots_that_an_event_has_not():
    batch = response([[0, 1]], [[1, 1]], [2])
    short = np.array(batch.latents)
    short[0, 1, 1] = 0
    recorder = LatentRecorder()
    recorder.add(Response(**{**vars(batch), "latents": short}), "a")
    found = recorder.memories()
    assert found.valid.tolist() == [[True, True], [True, False]]
    np.testing.assert_array_equal(found.means()[1], short[0, 1, 0])


def test_recorder_survives_a_round_trip_and_goes_on(tmp_path: Path):
    recorder, (_, second) = recorded()
    recorder.save(tmp_path / "latents.npz")
    loaded = LatentRecorder.load(tmp_path / "latents.npz")
    for both in (recorder, loaded):
        both.add(second, "a longer tag than before")
    for name, values in vars(recorder.memories()).items():
        np.testing.assert_array_equal(getattr(loaded.memories(), name), values)
    for name in ("decisions", "count", "row_tag"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(recorder, name))
    assert loaded.row_tag[-1] == "a longer tag than before"


def test_a_recorder_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recorder, (_, second) = recorded()
    recorder.save(tmp_path / "latents.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["latents.npz"]
    before = (tmp_path / "latents.npz").read_bytes()
    recorder.add(second, "words")

    def killed(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", killed)
    with pytest.raises(KeyboardInterrupt):
        recorder.save(tmp_path / "latents.npz")
    assert (tmp_path / "latents.npz").read_bytes() == before


def test_recorder_names_mistakes(tmp_path: Path):
    recorder, (first, _) = recorded()
    with pytest.raises(ValueError, match="2 tags for 3 rows"):
        recorder.add(first, ["a", "b"])
    with pytest.raises(ValueError, match=r"\[2, 5\] after others of shape \[2, 3\]"):
        recorder.add(response([[0]], [[1]], [1], width=5), "a")
    with pytest.raises(ValueError, match="nothing was recorded"):
        LatentRecorder().memories()
    with pytest.raises(ValueError, match="latents.txt: choose a name that ends in .npz"):
        recorder.save(tmp_path / "latents.txt")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"other.npz holds \['weights'\]"):
        LatentRecorder.load(tmp_path / "other.npz")


def test_means_leave_out_slots_that_are_not_valid():
    latents = np.array([[[1, 2], [3, 4]], [[5, 6], [70, 80]], [[9, 9], [9, 9]]], np.float32)
    valid = np.array([[True, True], [True, False], [False, False]])
    np.testing.assert_array_equal(sequence_means(latents, valid), [[2, 3], [5, 6], [0, 0]])


def test_effective_rank_of_known_spectra():
    """Orthonormal rows: K; one direction: 1; singular values 3 to 1: exp of that entropy."""
    eye, zero = np.eye(4, 8), np.zeros((4, 8))
    alike = np.ones((4, 1)) * np.arange(8)
    three_to_one = zero.copy()
    three_to_one[0, 2], three_to_one[3, 5] = 3, 1
    latents = np.stack([eye, 7 * eye, alike, three_to_one, zero, eye])
    valid = np.ones((6, 4), bool)
    valid[5, 2:] = False
    expected = [4, 4, 1, math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), 0, 2]
    np.testing.assert_allclose(effective_rank(latents, valid), expected, atol=1e-6)


def blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four groups of 12, 10, 8, 6 points around far corners, shuffled, and their numbers."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(4), [12, 10, 8, 6]))
    return (10 * np.eye(4, 6)[group] + 0.1 * rng.normal(size=(36, 6))).astype(np.float32), group


def test_clusters_are_found_and_numbered_by_size():
    for seed in range(3):  # k-means meets them in another order each time
        means, group = blobs(seed)
        found = cluster(means)
        np.testing.assert_array_equal(found.labels, group)
        for number in range(4):
            members = means[group == number]
            np.testing.assert_allclose(found.centroids[number], members.mean(axis=0), atol=1e-5)
        assert found.silhouette > 0.9
    np.testing.assert_array_equal(cluster(means).centroids, found.centroids)
    assert cluster(np.random.default_rng(0).normal(size=(200, 6))).silhouette < 0.3


def test_the_picture_keeps_groups_together():
    means, group = blobs()
    for points, (picture, how) in (
        (36, embed_2d(means)),
        (10, embed_2d(means[:10])),
    ):
        assert how == ("t-SNE" if points == 36 else "PCA") and picture.shape == (points, 2)
        gaps = np.linalg.norm(picture[:, None] - picture[None], axis=2)
        np.fill_diagonal(gaps, np.inf)
        assert (group[:points][gaps.argmin(axis=1)] == group[:points]).mean() > 0.85
    np.testing.assert_array_equal(embed_2d(means)[0], embed_2d(means)[0])


def test_nearest_tokens_by_cosine_with_what_they_are_worth():
    table = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 0]], np.float32)
    latents = np.array([[0, 0, -60], [5, 5, 0], [0.5, 0.1, 0]], np.float32)
    found = nearest_tokens(latents, table, k=2)
    assert found.ids[1].tolist()[0] == 3 and found.ids[2].tolist() == [0, 3]
    np.testing.assert_allclose(found.cosine[1], [1, math.sqrt(0.5)], rtol=1e-6)
    assert found.cosine[0].tolist() == [0, 0]  # far from all: there is a nearest all the same
    np.testing.assert_allclose(found.norm_ratio[0], 60 / ((6 + math.sqrt(2)) / 4), rtol=1e-6)
    many = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    cosine = many @ table.T / np.linalg.norm(many, axis=1)[:, None] / np.linalg.norm(table, axis=1)
    np.testing.assert_array_equal(nearest_tokens(many, table, 4).ids, np.argsort(-cosine, axis=1))
    none = nearest_tokens(latents[:0], table, 2)  # where no memory was woven
    assert none.ids.shape == none.cosine.shape == (0, 2) and none.norm_ratio.shape == (0,)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} of 4 tokens"):
            nearest_tokens(latents, table, k)


def test_histogram_counts_by_relative_position_and_tag():
    recorder, _ = recorded()
    found = invocation_histogram(recorder.decisions, recorder.count, recorder.row_tag, bins=2)
    assert found.edges.tolist() == [0, 0.5, 1]
    # Row of 4 tokens [1,-1|-1,1], row of 2 tokens [0|0]; rows [0,-1|1,0] and [1|1].
    assert {tag: n.tolist() for tag, n in found.queried.items()} == {
        "sums": [2, 2],
        "words": [2, 3],
    }
    assert {t: n.tolist() for t, n in found.invoked.items()} == {"sums": [1, 1], "words": [1, 2]}
    assert found.rows == {"sums": 2, "words": 2}


def test_center_distances_and_what_length_does_to_them():
    """Latents 60 times as long, pointing the same way: only the Euclidean distance is fooled."""
    rng = np.random.default_rng(0)
    context = rng.normal(size=(30, 5))
    other = rng.normal(size=(30, 5))
    found = center_distances({"context": context, "latents": 60 * context, "other": other})
    assert set(found) == {("context", "latents"), ("context", "other"), ("latents", "other")}
    lengths = np.linalg.norm(context, axis=1)
    assert found["context", "latents"].euclidean == pytest.approx(59 * lengths.mean())
    assert found["context", "latents"].cosine == pytest.approx(0, abs=1e-12)
    gap = np.linalg.norm(context - other, axis=1).mean()
    assert found["context", "other"].euclidean == pytest.approx(gap)

    assert found["context", "latents"].whitened == pytest.approx(0, abs=1e-12)
    assert found["context", "other"].whitened == pytest.approx(found["latents", "other"].whitened)

    # All share a direction, so that cosines are blind too; two of them differ in nothing else.
    shared = 1000 * np.eye(5)[0]
    a, b = context + shared, other + shared
    found = center_distances({"a": a, "near": a + 0.01 * other, "far": b})
    assert found["a", "far"].cosine < 1e-4
    assert found["a", "far"].whitened > 2 > 0.1 > found["a", "near"].whitened
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    turned = center_distances({"a": a @ turn, "far": b @ turn})["a", "far"]
    assert turned == pytest.approx(center_distances({"a": a, "far": b})["a", "far"])
    with pytest.raises(ValueError, match=r"\{'a': \[30, 5\], 'b': \[3, 5\]\}"):
        center_distances({"a": context, "b": context[:3]})


@jax.jit
def keep(hook, latents, valid, keys):
    """What a hook says, compiled as in generation."""
    return hook(latents, valid, keys)


def ablation_inputs(means: np.ndarray) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Memories of two latents around each mean, and a third slot of garbage that is not valid."""
    latents = np.stack([means - 1, means + 1, 1e6 * np.ones_like(means)], axis=1)
    valid = np.broadcast_to([True, True, False], latents.shape[:2])
    return latents.astype(np.float32), valid, jax.random.split(jax.random.key(0), len(means))


def test_53_ablation_drops_its_cluster_and_no_other():
    means, group = blobs()
    found, inputs = cluster(means), ablation_inputs(means)
    keep.clear_cache()
    for number in range(4):
        kept = keep(ClusterAblation.of(found, number), *inputs)
        np.testing.assert_array_equal(kept, group != number)
    assert keep._cache_size() == 1  # which cluster is not part of the program
    everything = Clusters(found.centroids[:1], found.labels, found.silhouette)
    assert not keep(ClusterAblation.of(everything, 0), *inputs).any()


def test_ablation_spares_memories_in_the_margin():
    two = Clusters(np.array([[0.0, 0], [10, 0]], np.float32), np.zeros(2), 1.0)
    means = np.array([[0, 0], [4, 0], [4.9, 0], [6, 0]], np.float32)
    inputs = ablation_inputs(means)
    for margin, kept in ((0, [0, 0, 0, 1]), (0.1, [0, 0, 1, 1]), (0.5, [0, 1, 1, 1]), (1, [1] * 4)):
        hook = ClusterAblation.of(two, 0, margin=margin)
        assert keep(hook, *inputs).tolist() == [bool(one) for one in kept]


def test_the_papers_rule_and_its_flaw():
    """Among the embeddings it finds the cluster; apart from them every centroid is near, so that
    ablating any cluster removes all memory, where the nearest centroid still tells.
    """
    means, group = blobs()
    rng = np.random.default_rng(1)
    alike = means + 20  # all point one way, and embeddings another: their numbers sum to 0
    elsewhere = rng.normal(size=(300, 6))
    elsewhere -= elsewhere.mean(axis=1, keepdims=True)
    found, inputs = cluster(alike), ablation_inputs(alike)
    for number in range(4):
        flawed = ClusterAblation.of(found, number, rule="paper", embeddings=elsewhere)
        assert not np.asarray(keep(flawed, *inputs)).any()
        nearest = ClusterAblation.of(found, number)
        np.testing.assert_array_equal(keep(nearest, *inputs), group != number)

    found, inputs = cluster(means), ablation_inputs(means)
    crowd = np.eye(4, 6)[np.arange(300) % 4] + 0.1 * rng.normal(size=(300, 6))
    for number in range(4):
        among = ClusterAblation.of(found, number, rule="paper", embeddings=crowd, neighbours=76)
        np.testing.assert_array_equal(keep(among, *inputs), group != number)
    only = ClusterAblation.of(found, 0, rule="paper", embeddings=crowd, neighbours=1)
    mean = np.asarray(inputs[0][:, :2].mean(axis=1))
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    near = unit(mean) @ unit(np.concatenate([found.centroids, crowd])).T
    np.testing.assert_array_equal(keep(only, *inputs), near.argmax(axis=1) != 0)


def test_control_drops_as_many_by_the_rows_keys():
    means, _ = blobs()
    ablation = ClusterAblation.of(cluster(means), 1)
    recorder = LatentRecorder()
    both = np.stack([means - 0.1, means + 0.1], axis=1)[:, None]
    points, decisions = np.zeros((36, 1)), np.ones((36, 1))
    batch = response(points, decisions, np.ones(36), width=6)
    recorder.add(Response(**{**vars(batch), "latents": both}), "a")
    rate = ablation.drop_rate(recorder.memories())
    assert rate == pytest.approx(10 / 36)
    control = CountMatchedControl.of(rate)
    keys = jax.random.split(jax.random.key(3), 4000)
    latents, valid = np.zeros((4000, 2, 6), np.float32), np.ones((4000, 2), bool)
    kept = np.asarray(keep(control, latents, valid, keys))
    assert abs(kept.mean() - 26 / 36) < 4 * math.sqrt(10 / 36 * 26 / 36 / 4000)
    np.testing.assert_array_equal(keep(control, latents[7:9], valid[7:9], keys[7:9]), kept[7:9])
    assert not np.asarray(keep(CountMatchedControl.of(1), latents, valid, keys)).any()
    assert np.asarray(keep(CountMatchedControl.of(0), latents, valid, keys)).all()


def assert_same(one: Response, other: Response) -> None:
    """Ids and events are equal; numbers as far as two programs can agree."""
    for name in ("tokens", "count", "decisions", "points"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("log_probs", "latents"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)


def test_53_filtered_generation():
    """Dropping nothing is the baseline, dropping all is a trigger that never invokes, and without
    a cluster none of its memories are left; all three are one program.
    """
    memgen, baseline = rollout("shallow", CONFIG, AlwaysInvoke())
    _, never = rollout("shallow", CONFIG, NeverInvoke())
    baseline, never = in_numpy((baseline, never))
    recorder = LatentRecorder()
    recorder.add(baseline, "all")
    memories = recorder.memories()
    assert len(memories.latents) > 4
    assert baseline.texts != never.texts and (never.points == -1).all()
    assert set(memories.valid.sum(axis=1)) == {2, 3}  # of inference and at the prompt
    found = cluster(memories.means(), 2)
    filtered = lambda hook: in_numpy(answer(memgen, keep_memory=hook))  # noqa: E731
    assert_same(filtered(ClusterAblation.of(found, 0, margin=1)), baseline)
    before = loop_module._respond._cache_size()
    far = np.stack([found.centroids[0], np.full(found.centroids.shape[1], 1e6)])
    everything = Clusters(far.astype(np.float32), found.labels, found.silhouette)
    assert_same(filtered(ClusterAblation.of(everything, 0)), never)
    left = 0
    for number in range(2):
        hook = ClusterAblation.of(found, number, margin=0)
        assert hook.drop_rate(memories) == pytest.approx((found.labels == number).mean())
        ablated = filtered(hook)
        recorder = LatentRecorder()
        recorder.add(ablated, "ablated")
        gaps = np.linalg.norm(recorder.memories().means()[:, None] - found.centroids, axis=2)
        assert (gaps.argmin(axis=1) != number).all()
        assert (ablated.decisions == 1).sum() == len(gaps)
        assert (ablated.decisions == 0).any()  # dropped is recorded as skipped
        left += len(gaps)
    assert left > 0
    assert loop_module._respond._cache_size() == before


def texts_of(figure) -> str:
    """Everything written in a figure, drawn first, so that it can be."""
    figure.savefig(io.BytesIO(), dpi=40)
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_figures_show_the_numbers():
    recorder, _ = recorded()
    histogram = invocation_histogram(recorder.decisions, recorder.count, recorder.row_tag, bins=2)
    figure = invocations_figure(histogram)
    heights = [[bar.get_height() for bar in axis.patches] for axis in figure.axes]
    assert heights == [[1, 1, 0.5, 0.5], [1, 1.5, 0.5, 1]]  # asked, then invoked, per response
    assert "words: 2 responses, invoked 3 of 5 times" in texts_of(figure)

    means, group = blobs()
    figure = clusters_figure(means[:, :2], "PCA", cluster(means), [f"tag {n % 9}" for n in group])
    assert [len(axis.collections) for axis in figure.axes] == [4, 4]
    assert "0 (12)" in texts_of(figure) and "tag 3" in texts_of(figure)

    ranks = ranks_figure(np.array([1.0, 2, 4]), ["a", "b", "b"], 4)
    assert "mean 1.00" in texts_of(ranks) and "mean 3.00" in texts_of(ranks)

    near = nearest_tokens(np.eye(3)[:2] * 7, np.eye(3), 2)
    words = texts_of(nearest_figure(near, ["\n", "$x$", " the"], ["slot 0", "slot 1"]))
    assert "⏎\n1.00" in words and "$x$\n1.00" in words and "slot 1  (7×)" in words

    figure = ablation_figure(
        {"0": (0.2, 0.01), "1": (0.5, 0.02)}, {"0": (0.4, 0.01), "1": (0.6, 0.01)}, (0.7, 0.01),
        "accuracy", {"0": 0.25, "1": 0.5},
    )  # fmt: skip
    bars = [p.get_height() for p in figure.axes[0].patches if p.get_width() < 0.5]
    assert bars == [0.2, 0.5, 0.4, 0.6] and "0\n25%" in texts_of(figure)

    centers = {"context": means, "latents": 2 * means}
    assert "context – latents" in texts_of(distances_figure(center_distances(centers)))

    report = ContinualReport(("a", "b"), np.array([[10, 20], [30, 25], [28, 40]]))
    words = texts_of(continual_figure(report))
    assert "30.0" in words and "backward transfer -2.0" in words and "before training" in words


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch):
    means, _ = blobs()
    found, table = cluster(means), np.eye(6, dtype=np.float32)
    for make, message in (
        (lambda: cluster(means, 1), "1 clusters of 36 different"),
        (lambda: cluster(np.ones((9, 2))), "4 clusters of 1 different"),
        (lambda: embed_2d(means[:1]), r"means of shape \[1, 6\]"),
        (lambda: invocation_histogram(np.zeros((1, 1)), np.ones(1), ["a"], 0), "bins=0"),
        (lambda: ClusterAblation.of(found, 4), "cluster=4 of 4: count from 0"),
        (lambda: ClusterAblation.of(found, 0, margin=1.5), "margin=1.5"),
        (lambda: ClusterAblation.of(found, 0, rule="far"), "rule='far'"),  # pyright: ignore
        (lambda: ClusterAblation.of(found, 0, rule="paper"), "needs embeddings"),
        (lambda: ClusterAblation.of(found, 0, embeddings=table), "the other none"),
        (lambda: CountMatchedControl.of(-0.1), "rate=-0.1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ValueError, match=r"scikit-learn.*thoughtbubbles\[memgen\]"):
        cluster(means)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib.*thoughtbubbles\[memgen\]"):
        ranks_figure(np.ones(2), ["a", "a"], 4)
