"""What a fork layer promises: budget, originals, order, exact gradients, no surprise by padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, SMALL, VOCAB, forked, logits_of, quick_model, random_tokens

from thoughtbubbles import (
    Candidates,
    Fork,
    PrefixRank,
    Streams,
    Thoughtbubbles,
    Threshold,
    TopK,
    merge,
)
from thoughtbubbles.forking import compact, merge_log_prob, merge_log_probs, take
from thoughtbubbles.ranking import best, prefix_ranks, ranks_among
from thoughtbubbles.rows import left_align, restore_alignment

# `python -m pytest -m experiment tests/test_forking.py` runs what goes the way of another.
POLICIES = [
    *(TopK(1.1), TopK(1.5), TopK(4.0), TopK(streams=30)),
    *(pytest.param(TopK(ratio), marks=pytest.mark.experiment) for ratio in (1.0, 2.0)),
]
WINDOW = pytest.param(PrefixRank(1.5, window=3), marks=pytest.mark.experiment)
CAUSAL = [PrefixRank(1.5), WINDOW, Threshold(1.5)]
# Of these a Threshold goes the way of the other causal policy.
ONE_CAUSAL = [PrefixRank(1.5), pytest.param(Threshold(1.5), marks=pytest.mark.experiment)]
MERGES = ("residual", "probability", "rightmost")


def with_policy(policy, **changes):
    return quick_model(dataclasses.replace(SMALL, policy=policy, **changes))


LENGTH = np.array([12, 7, 1, 0])


@pytest.mark.parametrize("policy", [*POLICIES, *CAUSAL], ids=str)
def test_budget_originals_and_order(policy):
    before = LENGTH
    for streams, original in forked(with_policy(policy), random_tokens(4, 12), LENGTH):
        alive, token = np.asarray(streams.alive), np.asarray(streams.token)
        for row in range(4):
            count = int(alive[row].sum())
            budget = getattr(policy, "streams", None) or policy.capacity(int(LENGTH[row]))
            assert count <= budget
            if isinstance(policy, TopK):
                assert count == min(budget, 2 * before[row]), "all of it if candidates suffice"
            assert not alive[row, count:].any(), "dead slots stand last"
            live = token[row, :count]
            assert (np.diff(live) >= 0).all(), "bubbles stay together, in order"
            assert set(live) == set(range(LENGTH[row])), "every original survives"
            assert int(np.asarray(original)[row].sum()) == LENGTH[row]
        before = alive.sum(axis=1)


def test_first_fork_layer_at_ratio_two_keeps_every_candidate():
    first, _ = forked(with_policy(TopK(2.0)), random_tokens(4, 12), LENGTH)[0]
    assert (np.asarray(first.token)[0] == np.repeat(np.arange(12), 2)).all()


def test_capacity_is_exact_for_decimal_ratios():
    assert TopK(1.1).capacity(10) == 11  # 1.1 * 10 in floating point is above 11
    assert TopK(1.5).capacity(3) == 5


@pytest.mark.parametrize(
    "changes",
    [{"fork_layers": ()}, {"fork_layers": (1,), "policy": TopK(2.0)}],
    ids=["no fork", "one fork layer that keeps everything"],
)
def test_nothing_to_select_is_causal(changes):
    config = dataclasses.replace(BASE, num_layers=2, **changes)
    tokens = np.asarray(random_tokens(64, 12))
    changed = tokens.copy()
    changed[:, -1] = (tokens[:, -1] + 1) % BASE.vocab_size
    before, after = (np.asarray(logits_of(quick_model(config), t)) for t in (tokens, changed))
    assert (before[:, :-1] == after[:, :-1]).all() and (before[:, -1] != after[:, -1]).any()


@jax.jit
def whole(model, tokens):
    """Logits and streams at the end."""
    streams = model.run(tokens).streams
    return model.logits(streams), streams


def test_permuting_the_batch_permutes_the_output():
    model, tokens = quick_model(SMALL), np.asarray(random_tokens(8, 12))
    order = np.random.default_rng(1).permutation(8)
    permuted = whole(model, tokens[order])[0]
    np.testing.assert_allclose(permuted, np.asarray(whole(model, tokens)[0])[order], atol=1e-5)


@jax.jit
def logits_by_merge(model, tokens, mask=None):
    """A model under each merge, in one program."""
    found = []
    for kind in MERGES:
        model.config = dataclasses.replace(model.config, merge=kind)
        found.append(model(tokens, mask))
    return found


# Places of seven tokens in a row of twelve.
PLACES = {"left": [*range(5, 12)], "right": [*range(7)], "middle": [0, 1, 4, 5, 6, 9, 11]}


@pytest.mark.parametrize("policy", [SMALL.policy, WINDOW, *ONE_CAUSAL[::-1]], ids=str)
def test_padding_never_changes_real_positions(policy):
    """Nor, where the policy is causal, do real tokens that come after."""
    model = quick_model(dataclasses.replace(SMALL, policy=policy))
    tokens = np.asarray(random_tokens(1, 7))
    padded, mask = np.full((4, 12), 3, np.int32), np.zeros((4, 12), bool)
    padded[:2] = [[VOCAB], [-100]]  # ids that are in no vocabulary, such as that of ignored labels
    for row, places in enumerate(PLACES.values()):
        padded[row, places], mask[row, places] = tokens[0], True
    padded[3, :7], mask[3] = tokens[0], True
    compute = logits_by_merge if policy == SMALL.policy else lambda *given: [logits_of(*given)]
    for with_padding, alone in zip(
        compute(model, padded, mask), compute(model, tokens), strict=True
    ):
        with_padding, alone = np.asarray(with_padding), np.asarray(alone)
        scale = max(1.0, np.abs(alone).max())
        for row in range(3):
            np.testing.assert_allclose(with_padding[row, mask[row]], alone[0], atol=1e-5 * scale)
        assert (with_padding[~mask] == 0).all()
        same = np.allclose(with_padding[3, :7], alone[0], rtol=1e-7, atol=1e-5 * scale)
        assert same == model.config.causal


def test_forks_without_embedding_and_attenuation_are_copies():
    """All scores 1 and no fork embedding: forking in front of layer 0 is the copy-2 baseline."""
    changes = {"num_layers": 2, "merge": "rightmost"}
    forking = dataclasses.replace(
        BASE, **changes, fork_layers=(0,), policy=TopK(2.0), fork_embedding=False
    )
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(quick_model(forking))))
    fork = params["forks"][0]
    fork["norm"] = {"scale": np.zeros(16, np.float32), "bias": np.full(16, 100, np.float32)}
    fork["score"] = np.ones_like(fork["score"])
    copying = dataclasses.replace(BASE, **changes, fork_layers=(), copies=2)
    tokens = random_tokens(2, 12)
    ours = logits_of(Thoughtbubbles.from_params(forking, params), tokens)
    copies = logits_of(Thoughtbubbles.from_params(copying, params | {"forks": {}}), tokens)
    np.testing.assert_allclose(ours, copies, atol=1e-5)


def test_ratio_one_keeps_only_attenuated_originals():
    for streams, _ in forked(with_policy(TopK(1.0)), random_tokens(4, 12), LENGTH):
        assert streams.token.shape == (4, 12)
        assert (np.asarray(streams.log_score)[np.asarray(streams.alive)] < 0).all()


def test_take_has_the_gradient_of_a_gather():
    rng = np.random.default_rng(0)
    keep = rng.random((3, 10)) < 0.6
    values = rng.normal(size=(3, 5, 4)).astype(np.float32)
    weights = rng.normal(size=(3, 7, 4)).astype(np.float32)

    @jax.jit
    def both(keep, values):
        plan = compact(keep, 7)

        def ours(values):
            pairs = plan.slot.reshape(3, 5, 2), plan.kept.reshape(3, 5, 2)
            taken = take(values, plan.source // 2, *pairs)
            return (jnp.where(plan.alive[..., None], taken, 0) * weights).sum()

        def plain(values):
            taken = jnp.take_along_axis(values, (plan.source // 2)[..., None], axis=1)
            return (jnp.where(plan.alive[..., None], taken, 0) * weights).sum()

        return [jax.value_and_grad(function)(values) for function in (ours, plain)]

    (value, gradient), (plain_value, plain_gradient) = both(keep, values)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, plain_gradient, atol=1e-6)


def test_gradients_agree_with_finite_differences_through_survivors():
    """The selection is a step, so a direction that flips no decision is followed."""
    model, tokens = quick_model(SMALL), random_tokens(1, 5)  # shared: not made in 64 bits
    with jax.enable_x64():
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)

        @jax.jit
        @jax.value_and_grad
        def loss(model):
            return -model.log_prob(model.run(tokens).streams, tokens).mean()

        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
        gradient = jax.tree.map(np.asarray, loss(params)[1])
        along = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
        step = 1e-3
        ahead, behind = (
            float(loss(jax.tree.map(lambda p, d, step=step: p + step * d, params, direction))[0])
            for step in (step, -step)
        )
        slope = sum(jax.tree.leaves(along))
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=2e-3)


WINDOWS = (None, 1, 3)


@jax.jit
def ranks_of(keys, token, place):
    """Ranks in each window, of all and of those at some places."""
    some = [jnp.take_along_axis(x, place, axis=1) for x in (keys, token)]
    return [
        (prefix_ranks(keys, token, window), ranks_among(keys, token, *some, place, window))
        for window in WINDOWS
    ]


@pytest.mark.parametrize("count", [1, 2, 17, 64, 100])
def test_prefix_ranks_are_counted_one_by_one(count):
    rng = np.random.default_rng(count)
    keys = rng.integers(-3, 3, (3, count)).astype(np.float32)
    keys[rng.random(keys.shape) < 0.2] = np.inf
    keys[rng.random(keys.shape) < 0.1] = -np.inf
    token = np.sort(rng.integers(0, max(count // 2, 1), (3, count)), axis=1).astype(np.int32)
    place = np.sort(rng.integers(0, count, (3, 5)), axis=1)
    for window, (ranks, among) in zip(WINDOWS, ranks_of(keys, token, place), strict=True):
        wanted = np.zeros((3, count), np.int64)
        for row, i, j in np.ndindex(3, count, count):
            in_prefix = token[row, j] <= token[row, i]
            if window is not None:
                in_prefix &= token[row, j] > token[row, i] - window
            ahead = keys[row, j] > keys[row, i] or (keys[row, j] == keys[row, i] and j < i)
            wanted[row, i] += in_prefix and ahead
        np.testing.assert_array_equal(ranks, wanted)
        np.testing.assert_array_equal(among, np.take_along_axis(wanted, place, axis=1))


def test_best_breaks_ties_towards_the_lower_index():
    keys = jnp.array([[1.0, 2.0, 1.0, 1.0], [jnp.inf, jnp.inf, 0.0, -jnp.inf]])
    mask = best(keys, jnp.array([2, 2]))
    assert mask.tolist() == [[True, True, False, False], [True, True, False, False]]
    assert not best(keys, jnp.array([0, 0])).any()


def test_a_policy_in_twenty_lines():
    """Anybody's policy plugs into Fork: here, fork the first half of the row, keep the rest."""

    @dataclasses.dataclass(frozen=True)
    class FirstHalf:
        causal = True

        def capacity(self, num_tokens: int) -> int:
            return 2 * num_tokens

        def keep(self, candidates: Candidates) -> jax.Array:
            early = candidates.token < candidates.num_tokens // 2
            return candidates.forced | (early & candidates.alive)

    @jax.jit
    def run_it(x):
        streams = Fork(8, FirstHalf(), rngs=nnx.Rngs(0))(Streams.start(x))
        return streams.token, merge(streams)

    token, merged = run_it(np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32))
    assert token[0, :9].tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5]
    assert merged.shape == (2, 6, 8)


def test_rotary_places_of_a_bubble():
    streams = Streams(
        jnp.zeros((1, 6, 2)),
        jnp.zeros((1, 6)),
        jnp.array([[0, 1, 1, 1, 2, 0]]),
        jnp.array([[True, True, True, True, True, False]]),
        length=jnp.array([3]),
        first=jnp.array([0]),
        num_tokens=3,
    )
    positions = jax.jit(Streams.positions)(streams)
    np.testing.assert_allclose(positions[0], [0, 1 / 3, 2 / 3, 1, 2, 0], atol=1e-6)
    assert streams.original[0].tolist() == [True, False, False, True, True, False]


def test_merge_log_prob_is_the_mixture_of_merge_log_probs():
    model = quick_model(dataclasses.replace(SMALL, merge="probability"))

    @jax.jit
    def both_ways(tokens, length):
        streams = model.run(tokens, length).streams
        log_probs = jax.nn.log_softmax(model.decode(streams.x))
        targets = jnp.take_along_axis(tokens, streams.token, axis=1)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        one = merge_log_prob(streams, chosen, model.config.vocab_size)
        return merge_log_probs(streams, log_probs, 4), one

    tokens = np.asarray(random_tokens(3, 9))
    log_probs, one = map(np.asarray, both_ways(tokens, np.array([9, 4, 0])))
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1.0, atol=1e-5)
    expected = np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(one, expected, atol=1e-5)


@pytest.mark.parametrize("forced_keep", [pytest.param(True, marks=pytest.mark.experiment), False])
def test_gradients_are_finite_with_padding_and_lost_tokens(forced_keep):
    """Of all merges added up: what is not finite in one of them is not finite in the sum."""
    tokens, length = random_tokens(3, 6), np.array([6, 3, 0])
    mask = np.arange(6) < length[:, None]

    @jax.jit
    @jax.grad
    def gradient(model):
        aligned, length, rank = left_align(tokens, mask)
        streams, total = model.run(aligned, length).streams, 0.0
        for kind in MERGES:
            model.config = dataclasses.replace(model.config, merge=kind)
            logits = restore_alignment(model.logits(streams), mask, rank)
            total += jnp.where(mask[..., None], jnp.tanh(logits), 0).sum()
            total += jnp.where(mask, model.log_prob(streams, tokens), 0).sum()
        return total

    leaves = jax.tree.leaves(
        gradient(quick_model(dataclasses.replace(SMALL, forced_keep=forced_keep)))
    )
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("policy", [TopK(1.5), WINDOW, *ONE_CAUSAL], ids=str)
def test_nan_reaches_the_logits(policy):
    """Comparisons with NaN are false: a careless selection would drop the evidence."""
    config = dataclasses.replace(SMALL, policy=policy)
    params = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(quick_model(config))))
    params["blocks"]["attention"]["q"][0, 0, 0, 0] = np.nan
    broken = Thoughtbubbles.from_params(config, params)
    tokens = np.array(random_tokens(8, 12))
    assert np.isnan(whole(broken, tokens)[0]).any()
    tokens[0, 3] = BASE.vocab_size
    assert np.isnan(whole(quick_model(config), tokens)[0]).any()


def test_merge_refuses_a_kind_without_residual():
    streams = whole(quick_model(SMALL), random_tokens(8, 12))[1]
    with pytest.raises(ValueError, match="merge_log_probs"):
        merge(streams, "probability")


@pytest.mark.parametrize("policy", [*ONE_CAUSAL, TopK(1.5)], ids=str)
def test_originals_keep_a_score_of_one_unless_asked(policy):
    """Then the first block after a fork writes into originals as if nothing had forked."""
    for scored in (False, True):
        model, there_are_forks = with_policy(policy, score_originals=scored), False
        for streams, original in forked(model, random_tokens(4, 12), LENGTH):
            original, log_score, alive = map(
                np.asarray, (original, streams.log_score, streams.alive)
            )
            assert (log_score[original] == 0).all() != scored
            assert (log_score[alive & ~original] < 0).all()
            there_are_forks |= (alive & ~original).any()
        assert there_are_forks


def test_an_ablation_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="forced_keep=False .* policy=PrefixRank"):
        dataclasses.replace(BASE, policy=PrefixRank(), forced_keep=False)
    with pytest.raises(ValueError, match="forced_keep=False .* score_originals=False"):
        Fork(4, TopK(), forced_keep=False, rngs=nnx.Rngs(0))
