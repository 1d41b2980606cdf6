"""Policies against slow NumPy loops over tokens, and what causal ones promise.

More settings of them: `python -m pytest -m experiment tests/test_policies.py`.
"""

import dataclasses
import functools
import itertools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import SMALL, forked, quick_model

from thoughtbubbles import Candidates, Fork, PrefixRank, Streams, Threshold, TopK
from thoughtbubbles.bubbles import bubbles_of
from thoughtbubbles.policies import grant

ROWS, TOKENS, SLOTS = 6, 10, 24
RATIOS = [1.0, 1.1, 1.5, 2.0, 3.0]
CAUSAL = [
    *(PrefixRank(1.1), PrefixRank(1.5, window=4), PrefixRank(2.0, burst=3)),
    *(Threshold(1.0), Threshold(3.0), Threshold(1.5, burst=3), Threshold(1.5, offset=0.2)),
]
OTHERS = (
    *(PrefixRank(1.0), PrefixRank(1.5), PrefixRank(2.0), PrefixRank(1.5, window=2)),
    *(PrefixRank(3.0), Threshold(1.1), Threshold(1.5), Threshold(2.0)),
    Threshold(1.5, offset=-0.5),
)
CAUSAL += [pytest.param(policy, marks=pytest.mark.experiment) for policy in OTHERS]


@dataclasses.dataclass
class Row:
    """The live candidates of a row, in order, as plain Python."""

    scores: list[float]  # log-scores
    tokens: list[int]
    forced: list[bool]
    length: int

    def of(self, token):
        return [i for i, t in enumerate(self.tokens) if t == token]

    def key(self, i):
        """What it ranks by, the lower index being the better of equals: originals, then NaN."""
        score = math.inf if self.forced[i] or math.isnan(self.scores[i]) else self.scores[i]
        return score, -i


def draw(seed, forced=True, nan=False, threshold=0.3):
    """Random candidates: bubbles of one to four, short and empty rows, many equal scores."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in [TOKENS, *rng.integers(0, TOKENS + 1, ROWS - 1).tolist()]:
        sizes = rng.integers(1, 5, length)
        while sizes.sum() > SLOTS:
            sizes[sizes.argmax()] -= 1
        tokens = np.repeat(np.arange(length), 2 * sizes)
        scores = -rng.integers(1, 200, len(tokens)) / 64  # exact, and coarse enough for ties
        if nan:
            scores[rng.random(len(tokens)) < 0.05] = np.nan
        last = np.flatnonzero(np.diff(tokens, append=length))
        keep = np.isin(np.arange(len(tokens)), last) & forced
        rows.append(Row(scores.tolist(), tokens.tolist(), keep.tolist(), length))
    return rows, stacked(rows, threshold)


def stacked(rows, threshold=0.3, first=None, width=2 * SLOTS):
    """`Candidates` of rows, dead slots last."""
    pad = lambda values, fill: [*values, *[fill] * (width - len(values))]  # noqa: E731
    return Candidates(
        *jax.device_put(
            (
                np.array([pad(row.scores, -0.01) for row in rows], np.float32),
                np.array([pad(row.tokens, 0) for row in rows], np.int32),
                np.array([pad([True] * len(row.tokens), False) for row in rows]),
                np.array([pad(row.forced, False) for row in rows]),
                np.array([row.length for row in rows], np.int32),
                np.array(first or [0] * len(rows), np.int32),
            )
        ),
        TOKENS,
        jax.device_put(np.float32(threshold)),
    )


@functools.partial(jax.jit, static_argnums=0)
def keep(policy, candidates):
    return policy.keep(candidates)


@functools.partial(jax.jit, static_argnums=0)
def keep_next(policy, candidates, state):
    return policy.keep_next(candidates, state)


def masks(array, rows):
    """A mask `[B, 2S]` as one list for each row, after checking that nothing dead is in it."""
    array = np.asarray(array)
    for mask, row in zip(array, rows, strict=True):
        assert not mask[len(row.tokens) :].any(), "a dead candidate was kept"
    return [mask[: len(row.tokens)].tolist() for mask, row in zip(array, rows, strict=True)]


# The definitions, one token after the other


def bucket(row, wanted, ratio, burst, granted=0):
    """n_i = min(n_{i-1} + w_i, floor((ratio - 1) (i + 1)) + burst); the best of each token."""
    kept = list(row.forced)
    for token in range(row.length):
        wants = [i for i in row.of(token) if wanted[i] and not row.forced[i]]
        budget = math.floor((Fraction(str(ratio)) - 1) * (token + 1)) + burst
        after = min(granted + len(wants), budget)
        for i in sorted(wants, key=row.key, reverse=True)[: after - granted]:
            kept[i] = True
        granted = after
    return kept, granted


def wants(policy, row, threshold=0.3):
    wanted = []
    for i, token in enumerate(row.tokens):
        if isinstance(policy, Threshold):
            level = np.clip(np.float32(threshold) + np.float32(policy.offset), 0, 0.999)
            wanted.append(not np.exp(np.float32(row.scores[i])) <= level)
            continue
        window = policy.window or TOKENS
        others = [j for j, t in enumerate(row.tokens) if token - window < t <= token]
        higher = sum(row.key(j) > row.key(i) for j in others)
        prefix = min(token + 1, window)
        wanted.append(higher < math.floor(Fraction(str(policy.ratio)) * prefix))
    return wanted


# Agreement with them


@pytest.mark.parametrize("burst", [0, 3])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_bucket_is_its_recursion(ratio, burst):
    compiled = jax.jit(functools.partial(grant, ratio=ratio, burst=burst))
    for seed in range(20):
        rows, candidates = draw(seed, forced=seed % 4 < 2, nan=seed % 2 == 1)
        wanted = np.random.default_rng(seed).random(candidates.token.shape) < 0.1 + 0.04 * seed
        kept, granted = compiled(candidates, wanted, granted=np.zeros(ROWS, np.int32))
        granted = np.asarray(granted)
        for row, want, mask, n in zip(rows, wanted, masks(kept, rows), granted, strict=True):
            assert (mask, int(n)) == bucket(row, want, ratio, burst)


def test_the_example_in_the_docstring_of_grant_is_true():
    """Token 2 has two streams, the others one; the first candidates of each token are demanded."""
    lines = re.findall(r"^ +(\w+) .*?  ((?:\d +)+\d)$", grant.__doc__ or "", re.MULTILINE)
    table = {name: np.array(numbers.split(), int) for name, numbers in lines}
    tokens = np.repeat(table["token"], [2, 2, 4, 2, 2])
    rank = np.array([(tokens[:i] == token).sum() for i, token in enumerate(tokens)])
    forced = np.append(np.diff(tokens), 1) > 0
    scores = np.linspace(-2, -1, len(tokens))  # the later of two is the better one
    rows = [Row(scores.tolist(), tokens.tolist(), forced.tolist(), 5)] * ROWS
    demand = np.zeros((ROWS, 2 * SLOTS), bool)
    demand[:, : len(tokens)] = rank < table["demand"][tokens]
    compiled = jax.jit(functools.partial(grant, ratio=1.5, burst=0))
    keep, total = compiled(stacked(rows), demand, granted=np.zeros(ROWS, np.int32))
    chosen = np.flatnonzero(masks(keep, rows)[0] & ~forced)
    assert np.bincount(tokens[chosen], minlength=5).tolist() == table["kept"].tolist()
    assert chosen[0] == 5, "the better one of token 2, whose candidates are 4 to 7"
    assert table["granted"].tolist() == np.cumsum(table["kept"]).tolist()
    assert total[0] == table["granted"][-1]
    assert table["budget"].tolist() == [(token + 1) // 2 for token in table["token"]]


@pytest.mark.parametrize("policy", CAUSAL, ids=str)
def test_a_causal_policy_is_its_rule(policy):
    binds = 0
    for seed in range(15):
        rows, candidates = draw(seed, nan=seed % 3 == 2, forced=seed % 5 > 0)
        for row, mask in zip(rows, masks(keep(policy, candidates), rows), strict=True):
            wanted = wants(policy, row)
            assert mask == bucket(row, wanted, policy.ratio, policy.burst)[0]
            binds += sum(wanted) > sum(mask)
    assert binds or policy.offset > 0, "else the bucket was not tested"


@pytest.mark.parametrize("policy", CAUSAL, ids=str)
def test_a_row_in_any_parts_is_the_row(policy):
    for seed in range(5):
        rows, candidates = draw(seed, nan=seed == 4)
        state = policy.init_state(ROWS, 2 * SLOTS)
        cuts = np.random.default_rng(seed).random(TOKENS - 1) < 0.4
        edges = [0, *(1 + np.flatnonzero(cuts)).tolist(), TOKENS]
        found = [[] for _ in rows]
        for start, end in itertools.pairwise(edges):
            parts = [part_of(row, start, end) for row in rows]
            piece = stacked(parts, first=[start] * ROWS)
            mask, state = keep_next(policy, piece, state)
            found = [old + new for old, new in zip(found, masks(mask, parts), strict=True)]
        assert found == masks(keep(policy, candidates), rows)


def part_of(row, start, end):
    here = [i for i, token in enumerate(row.tokens) if start <= token < end]
    return Row(
        [row.scores[i] for i in here],
        [row.tokens[i] - start for i in here],
        [row.forced[i] for i in here],
        min(max(row.length - start, 0), end - start),
    )


@pytest.mark.parametrize("policy", CAUSAL, ids=str)
def test_no_prefix_exceeds_its_capacity_and_no_original_dies(policy):
    for seed in range(100, 140):
        rows, candidates = draw(seed)
        for row, mask in zip(rows, masks(keep(policy, candidates), rows), strict=True):
            for tokens in range(1, row.length + 1):
                count = sum(kept for kept, t in zip(mask, row.tokens, strict=True) if t < tokens)
                assert count <= math.floor(Fraction(str(policy.ratio)) * tokens) + policy.burst
                assert count <= policy.capacity(tokens)
            assert all(kept for kept, forced in zip(mask, row.forced, strict=True) if forced)


@pytest.mark.parametrize("policy", CAUSAL, ids=str)
def test_later_tokens_and_dead_slots_decide_nothing(policy):
    """A row cut after any token keeps there what the whole row keeps."""
    rows, candidates = draw(0)
    whole = masks(keep(policy, candidates), rows)
    for end in range(1, TOKENS):
        parts = [part_of(row, 0, end) for row in rows]
        cut = masks(keep(policy, stacked(parts)), parts)
        assert cut == [mask[: len(part.tokens)] for mask, part in zip(whole, parts, strict=True)]


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_prefix_rank_is_top_k_of_each_prefix_for_its_newest_token(ratio):
    """Where the ratio makes a whole number of the prefix; elsewhere TopK rounds up."""
    policy, compared = PrefixRank(ratio, burst=10**6), 0
    for seed in range(10):
        rows, candidates = draw(seed)
        causal = masks(keep(policy, candidates), rows)
        for end in range(1, TOKENS + 1):
            if (ratio * end) % 1:
                continue
            prefixes = [part_of(row, 0, end) for row in rows]
            top = masks(keep(TopK(ratio), stacked(prefixes)), prefixes)
            for row, ours, theirs in zip(rows, causal, top, strict=True):
                for i in row.of(end - 1):
                    assert ours[i] == theirs[i]
                    compared += ours[i] and not row.forced[i]
    assert compared > 20


def test_gate_values():
    rows, candidates = draw(3, nan=True)
    for policy in (Threshold(1.5), Threshold(1.5, offset=0.25), Threshold(1.5, gate=False)):
        found = jax.jit(policy.scores)(candidates)
        level = 0.3 + policy.offset
        for row, scores in zip(rows, np.asarray(found), strict=True):
            for i, old in enumerate(row.scores):
                expected = old
                if policy.gate and not row.forced[i] and math.exp(old) > level:
                    expected = math.log((math.exp(old) - level) / (1 - level))
                np.testing.assert_allclose(scores[i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 1.1, 3.0])
def test_meeting_point_has_room_for_all_above_it(ratio):
    for seed in range(10):
        rows, candidates = draw(seed)
        points = []
        for row in filter(lambda row: row.length, rows):
            free = [s for s, forced in zip(row.scores, row.forced, strict=True) if not forced]
            room = math.floor((Fraction(str(ratio)) - 1) * row.length)
            points.append(math.exp(sorted(free)[-1 - room]) if room < len(free) else 0.0)
        found = jax.jit(Threshold(ratio).meeting_point)(candidates)
        assert float(found) == pytest.approx(np.mean(points), abs=1e-6)


def test_threshold_without_a_fork_is_refused():
    _, candidates = draw(0)
    with pytest.raises(ValueError, match="use it in a Fork"):
        Threshold().keep(dataclasses.replace(candidates, threshold=None))


# In a fork layer and in a model


@pytest.mark.parametrize("ratio", [1.25, pytest.param(1.75, marks=pytest.mark.experiment)])
def test_tracking_meets_the_budget(ratio):
    """On stationary scores, wants come to the budget that tracking aims at."""
    fork = Fork(8, Threshold(ratio), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(fork)

    def update(state, key):
        fork = nnx.merge(graphdef, state, copy=True)
        streams = Streams.start(jax.random.normal(key, (32, 64, 8)))
        fork(streams, track=True)
        candidates = fork.candidates(streams)
        wanted = jnp.exp(candidates.log_score) > fork.threshold[...]  # pyright: ignore
        return nnx.state(fork), (wanted & ~candidates.forced).sum() / (32 * 64)

    @jax.jit
    def all_updates(state):
        return jax.lax.scan(update, state, jax.random.split(jax.random.key(1), 400))[1]

    rates = np.asarray(all_updates(state))
    assert rates[0] > 0.9, "at first everything is wanted"
    assert 1 + np.mean(rates[200:]) == pytest.approx(ratio, rel=0.02)
    assert np.mean(rates[200:]) == pytest.approx(ratio - 1, rel=0.05)


@pytest.mark.parametrize("gate", [True, False])
def test_the_gate_makes_the_birth_of_a_stream_continuous(gate):
    """A score crosses θ: with the gate the new stream weighs nothing at first.

    With a weight of exactly p on keys; its root would make the step a steep slope. Positions are
    whole numbers, because a bubble's forks move when another joins it.
    """
    config = dataclasses.replace(
        SMALL, policy=Threshold(4.0, gate=gate), score_bias="none", fractional_positions=False
    )
    model, tokens = quick_model(config, seed=17), np.arange(9)[None]  # equal ones would tie
    all_live = forked(model.with_policy(TopK(2.0)), tokens, np.array([9]))[0][0]
    scores = np.exp(np.asarray(all_live.log_score)[0, ::2])

    @jax.jit
    def loss(model, threshold):
        model.forks[0].threshold[...] = threshold
        streams = model.run(tokens)
        return -model.log_prob(streams.streams, tokens).mean(), streams.forks[0].alive.sum()

    steps = []
    for score in scores[:3]:
        (before, fewer), (after, more) = loss(model, score + 1e-5), loss(model, score - 1e-5)
        assert more == fewer + 1
        steps.append(abs(float(after - before)))
    assert max(steps) < 1e-5 if gate else min(steps) > 2e-3, steps


BITS = 10


@jax.jit
def counts_of(model, tokens):
    return [bubbles_of(streams)[0] for streams in model.run(tokens).forks]


@functools.cache
def counts_of_all_strings(policy, seed):
    """All strings of some bits `[2**BITS, BITS]`, and each fork layer's streams of each token."""
    model = quick_model(dataclasses.replace(SMALL, vocab_size=2, policy=policy), seed)
    strings = np.array(list(itertools.product((0, 1), repeat=BITS)), np.int32)
    counts = [np.asarray(count) for count in counts_of(model, strings)]
    assert len(np.unique(counts[0], axis=0)) > 9, "forks do not depend on the string"
    return strings, counts


def information(policy, seed):
    """Bits that stream counts of tokens up to t tell of token t + 1 beyond the prefix, over all t.

    Exact, for random bits; at most 9.
    """
    strings, layers = counts_of_all_strings(policy, seed)
    bits = 0.0
    for t in range(BITS - 1):
        seen = np.concatenate([strings[:, : t + 1], *(c[:, : t + 1] for c in layers)], axis=1)
        with_next = np.concatenate([seen, strings[:, t + 1 : t + 2]], axis=1)
        # The next bit given the prefix has 1 bit; given the counts too, what is left.
        bits += 1 - (entropy(with_next) - entropy(seen))
    return bits


def entropy(rows):
    share = np.unique(rows, axis=0, return_counts=True)[1] / len(rows)
    return float(-(share * np.log2(share)).sum())


@pytest.mark.parametrize(
    ("policy", "seed"),
    [
        (PrefixRank(1.5), 0),
        (Threshold(1.5, offset=0.3), 2),
        pytest.param(PrefixRank(1.5, window=4), 1, marks=pytest.mark.experiment),
    ],
    ids=str,
)
def test_causal_stream_counts_are_a_function_of_the_prefix(policy, seed):
    strings, layers = counts_of_all_strings(policy, seed)
    for t in range(BITS):
        seen = np.concatenate([strings[:, : t + 1], *(c[:, : t + 1] for c in layers)], axis=1)
        assert len(np.unique(seen, axis=0)) == 2 ** (t + 1)
    assert information(policy, seed) == pytest.approx(0, abs=1e-9)


def test_stream_counts_of_top_k_tell_the_next_token():
    """Some bits of the 9: with these weights 1.6 and 1.4."""
    assert information(TopK(1.5), 0) > 1 and information(TopK(1.5), 1) > 1


@pytest.mark.parametrize("kind", [TopK, PrefixRank])
def test_the_budget_of_a_long_row_fits_32_bits(kind):
    rows, candidates = draw(0)
    late = jax.device_put(np.full(ROWS, 3000, np.int32))
    late = dataclasses.replace(candidates, length=late, first=late)
    assert masks(keep(kind(999.999), late), rows) == [[True] * len(row.tokens) for row in rows]
    with pytest.raises(ValueError, match="burst=2000000000 is above 1073741824: choose less"):
        PrefixRank(burst=2_000_000_000)


@pytest.mark.parametrize("ratio, window", [(1.25, 3), (1.5, 1), (1.1, 9), (1.001, 999)])
def test_a_window_whose_originals_use_up_its_budget_is_refused(ratio, window):
    message = rf"window={window} with ratio={ratio} never forks.* a window of {window + 1} or more"
    with pytest.raises(ValueError, match=message):
        PrefixRank(ratio, window)
    # The smallest one that is accepted forks.
    policy = PrefixRank(ratio, window + 1)
    assert math.floor(Fraction(str(ratio)) * policy.window) > policy.window
    assert PrefixRank(1.0, window).capacity(8) == 8, "a ratio of 1 says that nothing forks"
    with pytest.raises(ValueError, match="burst=4 with ratio=1.0 never forks"):
        PrefixRank(1.0, burst=4)
