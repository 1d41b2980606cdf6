"""The policy loss, in 64 bits, against numbers worked out by hand and a loop over tokens."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import make_example

import memgen
from train.rl.learning.advantages import dr_grpo, grpo
from train.rl.learning.losses import LOSSES, Aggregate, ClippedLoss, PolicyLoss


@pytest.fixture(autouse=True)
def in_64_bits() -> Iterator[None]:
    with jax.enable_x64():
        yield


@partial(jax.jit, static_argnames=("config", "max_length"))
def derived(config: PolicyLoss, rows: dict, max_length: int = 4):
    """Numerator, denominator, sums and the gradient of the numerator."""

    def numerator(log_probs):
        total, weight, sums = config(**rows | {"log_probs": log_probs}, max_length=max_length)
        return total, (weight, sums)

    (total, (weight, sums)), slope = jax.value_and_grad(numerator, has_aux=True)(rows["log_probs"])
    return total, weight, sums, slope


def mean(config: ClippedLoss, rows: dict, max_length: int = 4) -> float:
    total, weight, _, _ = derived(config, rows, max_length)
    return float(total / weight)


def padded(rows: list[list[float]], fill: float = np.nan) -> np.ndarray:
    longest = max(map(len, rows))
    return np.array([row + [fill] * (longest - len(row)) for row in rows], np.float64)


def of_rows(advantages, log_probs, old, **more) -> dict:
    """Rows of log-probabilities; what they don't reach to is NaN."""
    old = padded(old)
    trained = ~np.isnan(old)
    spread = np.where(trained, np.asarray(advantages, np.float64)[:, None], np.nan)
    found = {
        "log_probs": padded(log_probs),
        "old_log_probs": old,
        "advantages": spread,
        "loss_mask": trained,
    }
    return found | {"valid": np.ones(len(old), bool)} | more


# Five rollouts of two problems, 13 tokens.
REWARD, GROUP, EVERY = np.array([1.0, 0, 0, 1, 0]), np.array([0, 0, 0, 1, 1]), np.ones(5, bool)
OLD = [[-1, -0.5, -2], [-0.7, -1.2], [-0.3, -0.9, -1.5, -0.4], [-2, -0.1, -0.6], [-1.1]]
MOVED = [[0.1, 0.3, -0.4], [0.2, -0.3], [0.05, -0.1, 0.4, -0.25], [0.3, -0.05, -0.3], [0.25]]
NOW = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(OLD, MOVED, strict=True)]
REFERENCE = [[value - 0.1 for value in row] for row in OLD]
GRPO, MEAN_ONLY = grpo(REWARD, GROUP, EVERY), dr_grpo(REWARD, GROUP, EVERY)


@pytest.mark.parametrize(
    "clip_high, advantages, expected",
    [
        (0.2, GRPO, {"sequence": 0.055536, "token": -0.073326, "constant": -0.047662}),
        (0.28, GRPO, {"sequence": 0.045606, "token": -0.084783, "constant": -0.055109}),
        (0.2, MEAN_ONLY, {"sequence": 0.037936, "token": -0.053684, "constant": -0.034895}),
    ],
    ids=["grpo", "dapo", "dr_grpo"],
)
def test_five_rollouts(clip_high: float, advantages: np.ndarray, expected: dict[Aggregate, float]):
    rows = of_rows(advantages, NOW, OLD)
    for aggregate, value in expected.items():
        config = ClippedLoss(clip_high=clip_high, aggregate=aggregate)
        assert mean(config, rows) == pytest.approx(value, abs=5.01e-7)
        sums = derived(config, rows)[2]
        assert sums["clipped"] == 4 and sums["tokens"] == 13 and "ref_kl" not in sums
        flat = np.concatenate(MOVED)
        np.testing.assert_allclose(sums["ratio"], np.exp(flat).sum(), rtol=1e-14)
        np.testing.assert_allclose(sums["approx_kl"], (np.exp(flat) - flat - 1).sum(), rtol=1e-13)


def test_divergence_from_the_reference():
    """k3 alone, by tokens and by rows, and with its coefficient in the loss."""
    rows = of_rows(GRPO, NOW, OLD, ref_log_probs=padded(REFERENCE))
    sums = derived(ClippedLoss(aggregate="sequence"), rows)[2]
    assert sums["ref_kl"] / 13 == pytest.approx(0.036757, abs=5e-7)
    added = mean(ClippedLoss(aggregate="sequence", kl=0.04), rows)
    assert added == pytest.approx(0.057099, abs=5e-7)
    still = rows | {"advantages": np.zeros_like(rows["old_log_probs"])}
    assert mean(ClippedLoss(aggregate="token", kl=1.0), still) == pytest.approx(0.036757, abs=5e-7)
    by_row = mean(ClippedLoss(aggregate="sequence", kl=1.0), still)
    assert by_row == pytest.approx(0.039071, abs=5e-7)


@pytest.mark.parametrize("now, reference, value", [(-1, -1.5, 0.106531), (-1, -0.8, 0.0214028)])
def test_k3_of_one_token(now: float, reference: float, value: float):
    rows = of_rows([0], [[now]], [[now]], ref_log_probs=np.array([[reference]]))
    assert derived(ClippedLoss(aggregate="token"), rows)[2]["ref_kl"] == pytest.approx(
        value, abs=5e-7
    )


def test_gradient_of_five_rollouts():
    _, weight, _, slope = derived(ClippedLoss(aggregate="sequence"), of_rows(GRPO, NOW, OLD))
    expected = [
        [-0.085076, 0, -0.051601, 0],
        [0.070518, 0, 0, 0],
        [0.030348, 0.026120, 0.043065, 0],
        [0, -0.044841, -0.034922, 0],
        [0.181588, 0, 0, 0],
    ]
    np.testing.assert_allclose(slope / weight, expected, rtol=0, atol=5.01e-7)
    np.testing.assert_array_equal(np.array(expected) == 0, slope == 0)  # exactly where it is cut


def test_gradient_of_the_first_step():
    _, weight, _, slope = derived(ClippedLoss(aggregate="sequence"), of_rows(GRPO, OLD, OLD))
    for row, length in enumerate(map(len, OLD)):
        expected = -GRPO[row] / (length * 5)
        np.testing.assert_allclose(slope[row, :length] / weight, expected, rtol=1e-14)
        np.testing.assert_array_equal(slope[row, length:], 0)


@pytest.mark.parametrize(
    "losses, expected",
    [
        ([[1, 1, 1, 1], [4]], {"token": 1.6, "sequence": 2.5, "constant": 0.5}),
        ([[1, 2, 3], [4]], {"token": 2.5, "sequence": 3.0, "constant": 0.625}),
    ],
)
def test_aggregation_of_known_losses(losses, expected: dict[Aggregate, float]):
    """Where nothing has moved yet the loss of a token is minus its advantage."""
    still = [[-1.0] * len(row) for row in losses]
    rows = of_rows([0, 0], still, still) | {"advantages": -padded(losses)}
    for aggregate, value in expected.items():
        assert mean(ClippedLoss(aggregate=aggregate), rows, 8) == pytest.approx(value, rel=1e-15)


def test_which_side_is_cut():
    """Two of the four corners keep their gradient."""
    ratio = np.array([1.5, 1.5, 0.5, 0.5])
    rows = of_rows([1, -1, 1, -1], np.log(ratio)[:, None].tolist(), [[0.0]] * 4)
    slope = derived(ClippedLoss(aggregate="token"), rows)[3][:, 0]
    np.testing.assert_allclose(slope, [0, 1.5, -0.5, 0], rtol=1e-14)


def test_dual_clip_bounds_negative_advantages():
    ratio = np.array([2.0, 5, 5])
    rows = of_rows([-1, -2, 2], np.log(ratio)[:, None].tolist(), [[0.0]] * 3)
    total, _, sums, slope = derived(ClippedLoss(dual_clip=3.0, aggregate="token"), rows)
    assert total == pytest.approx(2 + 3 * 2 - 1.2 * 2, rel=1e-14)
    np.testing.assert_allclose(slope[:, 0], [2, 0, 0], rtol=1e-14)
    assert sums["clipped"] == 1  # the last one
    assert derived(ClippedLoss(aggregate="token"), rows)[0] == pytest.approx(
        2 + 5 * 2 - 1.2 * 2, rel=1e-14
    )


def test_far_ratios_are_cut():
    rows = of_rows([-1, -1], [[0.0], [-100.0]], [[-100.0], [0.0]])
    total, _, _, slope = derived(ClippedLoss(clip_low=1.0, aggregate="token"), rows)
    assert total == pytest.approx(math.exp(20) + math.exp(-20), rel=1e-14)
    np.testing.assert_array_equal(slope, 0)


def test_importance_weights_are_cut_before_aggregation():
    """Each token by its own weight, never the divergence, and without a gradient."""
    sampler = np.log([[0.25, 2.0, 0.1]])
    rows = of_rows([1], [[0.0] * 3], [[0.0] * 3], sampling_log_probs=sampler)
    rows |= {"ref_log_probs": np.full((1, 3), 0.2)}
    total, _, _, slope = derived(ClippedLoss(importance_cap=2.0, aggregate="token"), rows)
    assert total == pytest.approx(-(2 + 0.5 + 2), rel=1e-14)
    np.testing.assert_allclose(slope, [[-2, -0.5, -2]], rtol=1e-14)
    with_kl = derived(ClippedLoss(importance_cap=2.0, kl=1.0, aggregate="token"), rows)[0]
    assert with_kl - total == pytest.approx(3 * 0.0214028, abs=3e-7)


def test_k3_as_a_loss_has_the_gradient_of_the_other_divergence():
    """On a choice of three, in expectation. The numbers belong to a uniform reference."""
    logits, reference = jnp.array([0.3, -0.2, 0.5]), jnp.full(3, -math.log(3))
    chances = jax.nn.softmax(logits)

    def loss(logits):
        column = jax.nn.log_softmax(logits)[:, None]
        total, weight, _ = ClippedLoss(kl=1.0, aggregate="token")(
            column,
            jax.lax.stop_gradient(column),
            jnp.zeros((3, 1)),
            jnp.ones((3, 1), bool),
            valid=jnp.ones(3, bool),
            max_length=1,
            weight=chances,
            ref_log_probs=reference[:, None],
        )
        return total / weight

    def of_the_reference(logits):
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(logits))).sum()

    def true(logits):
        return (jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - reference)).sum()

    def k2(logits):
        return (chances * (reference - jax.nn.log_softmax(logits)) ** 2 / 2).sum()

    def k1(logits):
        return (chances * (jax.nn.log_softmax(logits) - reference)).sum()

    losses = {"k3": loss, "reference": of_the_reference, "true": true, "k2": k2, "k1": k1}
    derive = lambda logits: {name: jax.value_and_grad(f)(logits) for name, f in losses.items()}  # noqa: E731
    derived = jax.jit(derive)(logits)
    value, slope = ({name: found[part] for name, found in derived.items()} for part in (0, 1))
    assert value["k3"] == pytest.approx(float(value["true"]), rel=1e-12)  # unbiased as a value
    expected = [0.020282, -0.118855, 0.098573]
    np.testing.assert_allclose(slope["k3"], expected, rtol=0, atol=5.01e-7)
    np.testing.assert_allclose(slope["k3"], slope["reference"], atol=1e-15)
    expected = [0.007376, -0.102766, 0.095390]
    np.testing.assert_allclose(slope["true"], expected, rtol=0, atol=5.01e-7)
    np.testing.assert_allclose(slope["k2"], slope["true"], atol=1e-15)
    np.testing.assert_allclose(slope["k1"], 0, atol=1e-15)


# Everything at once, and each aggregation.
PLAIN = [ClippedLoss(aggregate=name) for name in ("sequence", "token", "constant")]
FULL = [
    dataclasses.replace(c, clip_high=0.28, dual_clip=1.5, kl=0.05, importance_cap=1.2)
    for c in PLAIN
]


def random_rows(seed: int, rows: int = 6, length: int = 7) -> dict:
    """Holes, a row without trained tokens, a filler row, NaN in all that doesn't count."""
    rng = np.random.default_rng(seed)
    trained = rng.random((rows, length)) < 0.7
    trained[1] = False
    valid = np.ones(rows, bool)
    valid[3] = False
    counts = trained & valid[:, None]

    def values(scale: float, around: float | np.ndarray = 0.0):
        return np.where(counts, around + scale * rng.normal(size=(rows, length)), np.nan)

    old = values(0.5, -1.5)
    return {
        "log_probs": values(0.4, old),
        "old_log_probs": old,
        "advantages": values(1.0),
        "loss_mask": trained,
        "valid": valid,
        "weight": np.where(valid, rng.uniform(0.2, 2, rows), np.nan),
        "ref_log_probs": values(0.4, old),
        "sampling_log_probs": values(0.2, old),
    }


def token_by_token(config: ClippedLoss, rows: dict, max_length: int):
    """Numerator, denominator and sums from the definitions."""
    numerator = denominator = 0.0
    sums = dict.fromkeys(("tokens", "clipped", "ratio", "approx_kl", "ref_kl"), 0.0)
    for k in np.flatnonzero(rows["valid"]):
        losses = []
        for t in np.flatnonzero(rows["loss_mask"][k]):
            now, old, advantage, reference, sampler = (
                float(rows[name][k, t])
                for name in (
                    "log_probs",
                    "old_log_probs",
                    "advantages",
                    "ref_log_probs",
                    "sampling_log_probs",
                )
            )
            ratio = math.exp(now - old)
            near = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            loss = max(-advantage * ratio, -advantage * near)
            if advantage < 0 and config.dual_clip is not None:
                loss = min(loss, -config.dual_clip * advantage)
            if config.importance_cap is not None:
                loss *= min(math.exp(old - sampler), config.importance_cap)
            kl = math.exp(reference - now) - (reference - now) - 1
            losses.append(loss + config.kl * kl)
            sums["tokens"] += 1
            sums["clipped"] += -advantage * near > -advantage * ratio
            sums["ratio"] += ratio
            sums["approx_kl"] += ratio - math.log(ratio) - 1
            sums["ref_kl"] += kl
        weight, length = rows["weight"][k], max(len(losses), 1)
        numerator += weight * sum(losses) / (length if config.aggregate == "sequence" else 1)
        denominator += weight * {
            "sequence": 1, "token": len(losses), "constant": max_length
        }[config.aggregate]  # fmt: skip
    return numerator, denominator, sums


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("config", PLAIN + FULL, ids=lambda c: f"{c.aggregate}-{c.kl}")
def test_agrees_with_a_loop_over_tokens(config: ClippedLoss, seed: int):
    rows = random_rows(seed)
    total, weight, sums, slope = derived(config, rows, 9)
    numerator, denominator, expected = token_by_token(config, rows, 9)
    np.testing.assert_allclose([total, weight], [numerator, denominator], rtol=1e-13)
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-12, err_msg=name)
    counts = rows["loss_mask"] & rows["valid"][:, None]
    np.testing.assert_array_equal(slope[~counts], 0)
    assert np.isfinite(slope).all() and (slope[counts] != 0).sum() > 10


@pytest.mark.parametrize("config", FULL, ids=lambda c: c.aggregate)
def test_gradient_agrees_with_finite_differences(config: ClippedLoss):
    rows = random_rows(11)
    slope = derived(config, rows)[3]
    step = 1e-6 * np.eye(slope.size).reshape(-1, *slope.shape)

    @jax.jit
    @jax.vmap
    def loss(log_probs):
        return config(**rows | {"log_probs": log_probs}, max_length=4)[0]

    differences = (loss(rows["log_probs"] + step) - loss(rows["log_probs"] - step)) / 2e-6
    np.testing.assert_allclose(differences.reshape(slope.shape), slope, rtol=0, atol=1e-8)


# Whatever a registry holds makes the same promises; it may have no options of ours.
OURS = {f"all options, {c.aggregate}": c for c in FULL}
EVERY_LOSS = (*OURS, *LOSSES)


def every(name: str) -> Any:
    """A loss of the registry by its name, or one of those above."""
    return OURS[name] if name in OURS else make_example(name, LOSSES[name], "loss")


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_order_of_rows_and_padding_change_nothing(name: str):
    config, rows = every(name), random_rows(5)
    whole = derived(config, rows)
    order = np.array([3, 5, 0, 2, 4, 1])
    total, weight, sums, slope = derived(config, {name: rows[name][order] for name in rows})
    np.testing.assert_allclose([total, weight], whole[:2], rtol=1e-13)
    np.testing.assert_allclose(slope, whole[3][order], rtol=1e-13)
    # Whatever filler and untrained tokens hold.
    other = dict(rows)
    for name in ("log_probs", "old_log_probs", "advantages", "ref_log_probs", "sampling_log_probs"):
        other[name] = np.where(np.isnan(rows[name]), -np.inf, rows[name])
    jax.tree.map(np.testing.assert_array_equal, derived(config, other), whole)
    # Without the filler row at all.
    real = {name: rows[name][rows["valid"]] for name in rows}
    total, weight, sums, slope = derived(config, real)
    np.testing.assert_allclose([total, weight], whole[:2], rtol=1e-13)
    np.testing.assert_allclose(slope, whole[3][rows["valid"]], rtol=1e-13)
    for name, value in sums.items():
        np.testing.assert_allclose(value, whole[2][name], rtol=1e-13)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_micro_batches_add_up(name: str):
    config, rows = every(name), random_rows(2)
    whole = derived(config, rows)
    parts = [
        derived(config, {name: rows[name][start : start + 2] for name in rows})
        for start in range(0, 6, 2)
    ]
    added = jax.tree.map(lambda *leaves: sum(leaves), *[part[:3] for part in parts])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), added, whole[:3])
    slope = np.concatenate([part[3] for part in parts])
    np.testing.assert_allclose(slope, whole[3], rtol=1e-12)


def test_a_row_of_weight_two_is_two_rows():
    rows = random_rows(8) | {"weight": np.array([1.0, 2, 1, 3, 0, 2])}
    repeats = np.array([1, 2, 1, 1, 0, 2])
    doubled = {name: np.repeat(rows[name], repeats, axis=0) for name in rows}
    doubled["weight"] = np.ones(repeats.sum())
    for config in FULL:
        np.testing.assert_allclose(
            derived(config, rows)[:2], derived(config, doubled)[:2], rtol=1e-13
        )


def test_a_row_without_trained_tokens_is_a_rollout_of_loss_zero():
    nothing = of_rows([1, 1], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    nothing["loss_mask"] = np.array([[True, True], [False, False]])
    values = {c.aggregate: mean(c, nothing) for c in PLAIN}
    assert values == {"sequence": -0.5, "token": -1.0, "constant": -0.25}


def test_nothing_valid_is_zero_over_zero():
    rows = random_rows(0) | {"valid": np.zeros(6, bool)}
    for config in PLAIN:
        total, weight, sums, slope = derived(config, rows)
        assert total == weight == 0 and not any(sums.values()) and not slope.any()


def test_groups_without_a_difference_have_no_gradient():
    """All rows of problem 0 earned 0.1; problem 1 was both solved and not."""
    reward = np.array([0.1, 0.1, 0.1, 1, 0])
    rows = of_rows(grpo(reward, GROUP, EVERY), NOW, OLD)
    slope = derived(ClippedLoss(aggregate="token"), rows)[3]
    np.testing.assert_array_equal(slope[:3], 0)
    assert slope[3:].any()


def test_single_precision_stays_single():
    rows = {
        name: values.astype(np.float32) if values.dtype == np.float64 else values
        for name, values in random_rows(0).items()
    }
    with jax.enable_x64(False):
        single = derived(FULL[0], rows)
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {np.dtype(np.float32)}
    double = derived(FULL[0], random_rows(0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), single, double)


def test_mistakes_are_named():
    for field, value in [
        ("clip_low", 1.5), ("clip_low", -0.1), ("clip_high", -0.1), ("clip_high", math.nan),
        ("dual_clip", 1.0), ("kl", -1.0), ("importance_cap", 0.0), ("aggregate", "rows"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{field}={value!r}: choose"):
            ClippedLoss(**{field: value})
    rows = of_rows(GRPO, NOW, OLD)
    with pytest.raises(ValueError, match=r"kl=0.1 needs the reference's"):
        derived(ClippedLoss(kl=0.1, aggregate="token"), rows)
    with pytest.raises(ValueError, match=r"importance_cap=2.0 needs the sampler's"):
        derived(ClippedLoss(importance_cap=2.0, aggregate="token"), rows)
    with pytest.raises(ValueError, match="max_length=0: choose 1 or more"):
        derived(ClippedLoss(aggregate="token"), rows, 0)
    with pytest.raises(ValueError, match=r"\(5, 1\) are not of tokens \(5, 4\)"):
        derived(ClippedLoss(aggregate="token"), rows | {"advantages": GRPO[:, None]})


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_loss_of_a_trigger_is_the_clipped_loss_of_its_decisions(kl: float):
    """That of `memgen`, for loops without a learner; a row without decisions counts as 0."""
    rng = np.random.default_rng(0)
    decisions = rng.integers(-1, 2, (4, 6))
    decisions[2] = -1
    rows = of_rows(rng.normal(size=4), *(np.log(rng.uniform(0.2, 0.9, (2, 4, 6))).tolist()))
    rows |= {"loss_mask": decisions >= 0, "ref_log_probs": rows["old_log_probs"] - 0.1}
    expected = derived(ClippedLoss(aggregate="sequence", kl=kl), rows)

    def total(log_probs):
        return memgen.trigger_loss(
            log_probs,
            decisions,
            rows["advantages"][:, 0],
            rows["old_log_probs"],
            rows["ref_log_probs"],
            kl=kl,
        )

    found, slope = jax.jit(jax.value_and_grad(total, has_aux=True))(rows["log_probs"])
    np.testing.assert_allclose(found, expected[:2], rtol=1e-12)
    np.testing.assert_allclose(slope, expected[3], rtol=1e-12)
    with pytest.raises(ValueError, match="kl=0.1 needs the reference"):
        memgen.trigger_loss(rows["old_log_probs"], decisions, np.ones(4), kl=0.1)
