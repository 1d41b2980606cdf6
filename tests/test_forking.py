"""What a fork layer promises: budget, originals, order, exact gradients, no surprise by padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, heavy_model, logits_of, random_tokens, run

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

POLICIES = [TopK(1.0), TopK(1.1), TopK(1.5), TopK(2.0), TopK(4.0), TopK(streams=30)]
CAUSAL = [PrefixRank(1.5), PrefixRank(1.5, window=3), Threshold(1.5)]


@pytest.mark.parametrize("policy", [*POLICIES, *CAUSAL], ids=str)
def test_budget_originals_and_order(policy):
    model = heavy_model(dataclasses.replace(BASE, policy=policy))
    tokens = random_tokens(4, 12)
    length = jnp.array([12, 7, 1, 0])
    for streams in run(model, tokens, length).forks:
        alive, token = np.asarray(streams.alive), np.asarray(streams.token)
        for row in range(4):
            count = int(alive[row].sum())
            budget = getattr(policy, "streams", None) or policy.capacity(int(length[row]))
            assert count <= budget
            assert not alive[row, count:].any(), "dead slots stand last"
            live = token[row, :count]
            assert (np.diff(live) >= 0).all(), "bubbles stay together, in order"
            assert set(live) == set(range(int(length[row]))), "every original survives"
            assert int(streams.original[row].sum()) == int(length[row])


def test_full_budget_is_used_when_candidates_suffice():
    streams = run(heavy_model(BASE), random_tokens(2, 12)).streams
    assert (streams.alive.sum(axis=1) == TopK(1.5).capacity(12)).all()


def test_first_fork_layer_at_ratio_two_keeps_every_candidate():
    model = heavy_model(dataclasses.replace(BASE, policy=TopK(2.0)))
    first = run(model, random_tokens(2, 12)).forks[0]
    assert (first.token == jnp.repeat(jnp.arange(12), 2)).all()


def test_capacity_is_exact_for_decimal_ratios():
    assert TopK(1.1).capacity(10) == 11  # 1.1 * 10 in floating point is above 11
    assert TopK(1.5).capacity(3) == 5


def test_changing_only_the_last_token_changes_earlier_logits():
    """TopK is not causal: later scores decide earlier forks. A causal policy must fail here."""
    model = heavy_model(BASE)
    tokens = random_tokens(64, 12)
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % BASE.vocab_size)
    difference = jnp.abs(logits_of(model, tokens) - logits_of(model, changed))[:, :-1]
    assert (difference.max(axis=(1, 2)) > 1e-3).sum() > 10
    assert not BASE.causal


@pytest.mark.parametrize(
    "changes",
    [{"fork_layers": ()}, {"fork_layers": (2,), "policy": TopK(2.0)}],
    ids=["no fork", "one fork layer that keeps everything"],
)
def test_nothing_to_select_is_causal(changes):
    model = heavy_model(dataclasses.replace(BASE, **changes))
    tokens = random_tokens(64, 12)
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % BASE.vocab_size)
    assert (logits_of(model, tokens)[:, :-1] == logits_of(model, changed)[:, :-1]).all()


@pytest.mark.parametrize("policy", CAUSAL, ids=str)
def test_causal_policies_are_causal(policy):
    """Changing only the last token, or cutting it off, changes nothing before it."""
    model = heavy_model(dataclasses.replace(BASE, policy=policy))
    tokens = random_tokens(64, 12)
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % BASE.vocab_size)
    logits = logits_of(model, tokens)[:, :-1]
    assert (logits == logits_of(model, changed)[:, :-1]).all()
    np.testing.assert_allclose(logits, logits_of(model, tokens[:, :-1]), atol=1e-4)
    assert model.config.causal


def test_permuting_the_batch_permutes_the_output():
    model, tokens = heavy_model(BASE), random_tokens(8, 12)
    order = np.random.default_rng(1).permutation(8)
    permuted = logits_of(model, tokens[order])
    np.testing.assert_allclose(permuted, logits_of(model, tokens)[order], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        *({"merge": kind} for kind in ("probability", "residual", "rightmost")),
        *({"policy": policy} for policy in CAUSAL),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_never_changes_real_positions(changes, side):
    model = heavy_model(dataclasses.replace(BASE, **changes))
    tokens = random_tokens(1, 7)
    places = {"left": range(5, 12), "right": range(7), "middle": [0, 1, 4, 5, 6, 9, 11]}[side]
    padded = jnp.full((1, 12), 3).at[0, jnp.array(list(places))].set(tokens[0])
    mask = jnp.zeros((1, 12), bool).at[0, jnp.array(list(places))].set(True)
    with_padding = logits_of(model, padded, mask)
    alone = logits_of(model, tokens)
    scale = max(1.0, float(jnp.abs(alone).max()))
    np.testing.assert_allclose(with_padding[mask[:, :]], alone[0], atol=1e-5 * scale)
    assert (with_padding[~mask] == 0).all()


def test_forks_without_embedding_and_attenuation_are_copies():
    """All scores 1 and no fork embedding: forking in front of layer 0 is the copy-2 baseline."""
    changes = {"fork_layers": (0,), "policy": TopK(2.0), "merge": "rightmost"}
    forking = heavy_model(dataclasses.replace(BASE, **changes, fork_embedding=False))
    bias = forking.forks[0].norm.bias
    forking.forks[0].norm.scale[...] = jnp.zeros_like(forking.forks[0].norm.scale[...])
    bias[...] = jnp.full_like(bias[...], 100.0)
    forking.forks[0].score[...] = jnp.ones_like(forking.forks[0].score[...])
    copying = dataclasses.replace(BASE, fork_layers=(), copies=2, merge="rightmost")
    params = nnx.to_pure_dict(nnx.state(forking, nnx.Param))
    params["forks"] = {}
    copies = Thoughtbubbles.from_params(copying, params)
    tokens = random_tokens(2, 12)
    np.testing.assert_allclose(logits_of(forking, tokens), logits_of(copies, tokens), atol=1e-5)


def test_ratio_one_keeps_only_attenuated_originals():
    model = heavy_model(dataclasses.replace(BASE, policy=TopK(1.0)))
    streams = run(model, random_tokens(2, 12)).streams
    assert streams.token.shape == (2, 12)
    assert (streams.log_score < 0).all()


def test_take_has_the_gradient_of_a_gather():
    rng = np.random.default_rng(0)
    keep = jnp.asarray(rng.random((3, 10)) < 0.6)
    plan = compact(keep, 7)
    values = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(3, 7, 4)), jnp.float32)

    def ours(values):
        taken = take(
            values, plan.source // 2, plan.slot.reshape(3, 5, 2), plan.kept.reshape(3, 5, 2)
        )
        return (jnp.where(plan.alive[..., None], taken, 0) * weights).sum()

    def plain(values):
        taken = jnp.take_along_axis(values, (plan.source // 2)[..., None], axis=1)
        return (jnp.where(plan.alive[..., None], taken, 0) * weights).sum()

    np.testing.assert_allclose(ours(values), plain(values), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(values), jax.grad(plain)(values), atol=1e-6)


def test_gradients_agree_with_finite_differences_through_survivors():
    """The selection is a step, so a direction that flips no decision is followed."""
    model, tokens = heavy_model(BASE), random_tokens(1, 5)  # shared: not made in 64 bits
    with jax.enable_x64():
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)
        graphdef, params = nnx.split(model)

        @jax.jit
        def loss(params):
            model = nnx.merge(graphdef, params)
            return -model.log_prob(model.run(tokens).streams, tokens).mean()

        direction = jax.tree.map(
            lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params
        )
        slope = sum(
            (g * d).sum()
            for g, d in zip(
                jax.tree.leaves(jax.grad(loss)(params)), jax.tree.leaves(direction), strict=True
            )
        )
        step = 1e-3
        ahead = loss(jax.tree.map(lambda p, d: p + step * d, params, direction))
        behind = loss(jax.tree.map(lambda p, d: p - step * d, params, direction))
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=2e-3)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 17, 64, 100])
def test_prefix_ranks_are_counted_one_by_one(count, window):
    rng = np.random.default_rng(count)
    keys = rng.integers(-3, 3, (3, count)).astype(np.float32)
    keys[rng.random(keys.shape) < 0.2] = np.inf
    keys[rng.random(keys.shape) < 0.1] = -np.inf
    token = np.sort(rng.integers(0, max(count // 2, 1), (3, count)), axis=1).astype(np.int32)
    wanted = np.zeros((3, count), np.int64)
    for row, i, j in np.ndindex(3, count, count):
        in_prefix = token[row, j] <= token[row, i]
        if window is not None:
            in_prefix &= token[row, j] > token[row, i] - window
        ahead = keys[row, j] > keys[row, i] or (keys[row, j] == keys[row, i] and j < i)
        wanted[row, i] += in_prefix and ahead
    np.testing.assert_array_equal(prefix_ranks(jnp.array(keys), jnp.array(token), window), wanted)
    place = np.sort(rng.integers(0, count, (3, 5)), axis=1)
    some = [np.take_along_axis(x, place, axis=1) for x in (keys, token)]
    among = ranks_among(jnp.array(keys), jnp.array(token), *some, place, window)
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

    fork = Fork(8, FirstHalf(), rngs=nnx.Rngs(0))
    streams = fork(Streams.start(jax.random.normal(jax.random.key(0), (2, 6, 8))))
    assert streams.token[0, :9].tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5]
    assert merge(streams).shape == (2, 6, 8)


def test_rotary_places_of_a_bubble():
    token = jnp.array([[0, 1, 1, 1, 2, 0]])
    alive = jnp.array([[True, True, True, True, True, False]])
    streams = Streams(
        jnp.zeros((1, 6, 2)),
        jnp.zeros((1, 6)),
        token,
        alive,
        length=jnp.array([3]),
        first=jnp.array([0]),
        num_tokens=3,
    )
    np.testing.assert_allclose(streams.positions()[0], [0, 1 / 3, 2 / 3, 1, 2, 0], atol=1e-6)
    assert streams.original[0].tolist() == [True, False, False, True, True, False]


def test_merge_log_prob_is_the_mixture_of_merge_log_probs():
    model = heavy_model(dataclasses.replace(BASE, merge="probability"))
    tokens = random_tokens(3, 9)
    streams = run(model, tokens, jnp.array([9, 4, 0])).streams
    log_probs = jax.nn.log_softmax(model.decode(streams.x))
    whole = merge_log_probs(streams, log_probs, 8)
    np.testing.assert_allclose(jnp.exp(whole).sum(axis=-1), 1.0, atol=1e-5)
    targets = jnp.take_along_axis(tokens, streams.token, axis=1)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    one = merge_log_prob(streams, chosen, model.config.vocab_size)
    expected = jnp.take_along_axis(whole, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(one, expected, atol=1e-5)


@pytest.mark.parametrize("forced_keep", [True, False])
@pytest.mark.parametrize("kind", ["residual", "probability", "rightmost"])
def test_gradients_are_finite_with_padding_and_lost_tokens(kind, forced_keep):
    config = dataclasses.replace(BASE, merge=kind, forced_keep=forced_keep)
    tokens, length = random_tokens(3, 6), jnp.array([6, 3, 0])
    mask = jnp.arange(6) < length[:, None]

    @jax.jit
    @jax.grad
    def by_logits(model):
        return jnp.where(mask[..., None], jnp.tanh(model(tokens, mask)), 0).sum()

    @jax.jit
    @jax.grad
    def by_log_prob(model):
        return jnp.where(mask, model.log_prob(model.run(tokens, length).streams, tokens), 0).sum()

    for gradient in (by_logits, by_log_prob):
        leaves = jax.tree.leaves(gradient(heavy_model(config)))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


@pytest.mark.parametrize("policy", [TopK(1.5), *CAUSAL], ids=str)
def test_nan_reaches_the_logits(policy):
    """Comparisons with NaN are false: a careless selection would drop the evidence."""
    config = dataclasses.replace(BASE, policy=policy)
    model = heavy_model(config)
    params = nnx.to_pure_dict(nnx.state(model))
    params["blocks"]["attention"]["q"] = (
        params["blocks"]["attention"]["q"].at[0, 0, 0, 0].set(jnp.nan)
    )
    broken = Thoughtbubbles.from_params(config, params)
    assert jnp.isnan(logits_of(broken, random_tokens(2, 12))).any()
    assert jnp.isnan(logits_of(model, random_tokens(2, 12).at[0, 3].set(BASE.vocab_size))).any()


def test_merge_refuses_a_kind_without_residual():
    streams = run(heavy_model(BASE), random_tokens(1, 4)).streams
    with pytest.raises(ValueError, match="merge_log_probs"):
        merge(streams, "probability")


@pytest.mark.parametrize("policy", [PrefixRank(1.5), Threshold(1.5), TopK(1.5)], ids=str)
def test_originals_keep_a_score_of_one_unless_asked(policy):
    """Then the first block after a fork writes into originals as if nothing had forked."""
    for scored in (False, True):
        config = dataclasses.replace(BASE, policy=policy, score_originals=scored)
        layers = run(heavy_model(config), random_tokens(4, 12)).forks
        for streams in layers:
            log_score = np.asarray(streams.log_score)
            assert (log_score[np.asarray(streams.original)] == 0).all() != scored
            assert (log_score[np.asarray(streams.alive & ~streams.original)] < 0).all()
        assert any((streams.alive & ~streams.original).any() for streams in layers)


def test_an_ablation_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="forced_keep=False .* policy=PrefixRank"):
        dataclasses.replace(BASE, policy=PrefixRank(), forced_keep=False)
    with pytest.raises(ValueError, match="forced_keep=False .* score_originals=False"):
        Fork(4, TopK(), forced_keep=False, rngs=nnx.Rngs(0))
