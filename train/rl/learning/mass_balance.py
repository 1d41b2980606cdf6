"""Mass balance of one update, which shows why more rollouts help (BroRL, arXiv 2510.01180).

The policy chooses one of `V` tokens with probabilities p = softmax(z). An update minimises the
surrogate -(1/N) sum_i R_i p_i over the tokens i that N rollouts have sampled. A sampled token has
the reward R_c if it is correct and R_w if not; other tokens have reward 0. Everything is computed
in float64.
"""

from typing import NamedTuple

import numpy as np


class MassBalance(NamedTuple):
    """First-order change of the probability of a correct token, and its terms.

    Attributes:
        correct_mass: Total probability of the correct tokens (Q_pos).
        baseline: Expected reward, the sum of R_i p_i over sampled tokens (S_R).
        sampled_correct: Sum of p^2 over sampled correct tokens (A_2).
        sampled_wrong: Sum of p^2 over sampled wrong tokens (B_2).
        unsampled_correct: Sum of p^2 over correct tokens that were not sampled (U_pos,2).
        unsampled_wrong: Sum of p^2 over wrong tokens that were not sampled (U_neg,2).
        terms: Contributions of the sampled correct tokens, the sampled wrong tokens, and the
            unsampled tokens, without the step size. For R_w <= 0 <= R_c the first two are never
            negative. The third, the unsampled coupling, has either sign, and vanishes as the number
            of rollouts grows.
        change: Change of the correct mass, the sum of the terms times the step size (ΔQ_pos).
    """

    correct_mass: float
    baseline: float
    sampled_correct: float
    sampled_wrong: float
    unsampled_correct: float
    unsampled_wrong: float
    terms: tuple[float, float, float]
    change: float


def mass_balance(
    logits: np.ndarray,
    correct: np.ndarray,
    sampled: np.ndarray,
    right: float = 1.0,
    wrong: float = -1.0,
    rate: float = 1.0,
) -> MassBalance:
    """Compute the first-order change of the correct mass by one update, term by term.

    ΔQ_pos = (η/N) [(R_c - S_R) Q_neg A_2 + (S_R - R_w) Q_pos B_2
                    + S_R (Q_pos U_neg,2 - Q_neg U_pos,2)], with Q_neg = 1 - Q_pos and the other
    symbols as in `MassBalance`.

    Args:
        logits: Logits of the `V` tokens, `[V]`.
        correct: Tokens that are correct, `[V]` bool.
        sampled: Tokens that were sampled at least once, `[V]` bool.
        right: Reward of a sampled correct token (R_c).
        wrong: Reward of a sampled wrong token (R_w).
        rate: Learning rate divided by the number of rollouts (η/N).

    Raises:
        ValueError: The shapes differ or are not `[V]`.
    """
    shapes = {np.shape(logits), np.shape(correct), np.shape(sampled)}
    if len(shapes) > 1 or np.ndim(logits) != 1:
        raise ValueError(
            f"logits {np.shape(logits)}, correct {np.shape(correct)} and sampled "
            f"{np.shape(sampled)}: give [V] for each"
        )
    p = softmax(logits)
    correct, sampled = np.asarray(correct, bool), np.asarray(sampled, bool)
    wrongs = ~correct
    sampled_correct, sampled_wrong, unsampled_correct, unsampled_wrong = (
        float((p[which] ** 2).sum())
        for which in (correct & sampled, wrongs & sampled, correct & ~sampled, wrongs & ~sampled)
    )
    positive = float(p[correct].sum())
    negative = 1.0 - positive
    expected = float(right * p[correct & sampled].sum() + wrong * p[wrongs & sampled].sum())
    terms = (
        (right - expected) * negative * sampled_correct,
        (expected - wrong) * positive * sampled_wrong,
        expected * (positive * unsampled_wrong - negative * unsampled_correct),
    )
    return MassBalance(
        positive, expected, sampled_correct, sampled_wrong, unsampled_correct, unsampled_wrong,
        terms, rate * sum(terms),
    )  # fmt: skip


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the probabilities `[V]` float64 of logits `[V]`."""
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return powers / powers.sum()


def unsampled_mass(rate: np.ndarray | float, count: np.ndarray | float) -> np.ndarray:
    """Compute a token's expected part of the sum of p^2 over unsampled tokens: p^2 (1-p)^N.

    Args:
        rate: Probability of the token in one rollout (p).
        count: Number of rollouts (N), of a shape that broadcasts with the shape of `rate`.
    """
    rate = np.asarray(rate, np.float64)
    return rate**2 * (1.0 - rate) ** count


class Simulated(NamedTuple):
    """Result of a simulated training.

    Attributes:
        correct_mass: Total probability of the correct tokens before the first step and after each
            step, `[steps + 1]`.
        worst: Smallest change of the probability of a single correct token by the whole training;
            if it is negative, the policy has lost knowledge.
        improved: Fraction of the correct tokens whose probability has increased.
    """

    correct_mass: np.ndarray
    worst: float
    improved: float


def simulate(
    rollouts: int,
    seed: int,
    tokens: int = 2000,
    correct: int = 160,
    steps: int = 300,
    learning_rate: float = 1e-3,
) -> Simulated:
    """Simulate the training of a policy that chooses one token, with N rollouts per step.

    The initial logit is 3 for correct tokens, 5 for one wrong token (the anchor), and 0 for all
    other tokens. A correct token has reward +1, a wrong token -1. AdamW (weight decay 0.01)
    minimises the surrogate -(1/N) sum_i (R_i - mean) p_i, where the mean is over the rewards of the
    step.

    Args:
        rollouts: Number of rollouts per step (N).
        seed: Seed of the rollouts.
        tokens: Number of tokens to choose from.
        correct: Number of correct tokens, which are the first tokens.
        steps: Number of optimizer steps.
        learning_rate: Learning rate of AdamW.
    """
    rng = np.random.default_rng(seed)
    logits = np.zeros(tokens)
    logits[:correct], logits[correct] = 3.0, 5.0
    reward = np.where(np.arange(tokens) < correct, 1.0, -1.0)
    first, second = np.zeros(tokens), np.zeros(tokens)
    p = before = softmax(logits)
    masses = [p[:correct].sum()]
    for step in range(1, steps + 1):
        drawn = rng.multinomial(rollouts, p) / rollouts
        pull = drawn * (reward - drawn @ reward) * p
        gradient = p * pull.sum() - pull
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        logits = logits - learning_rate * (first / (1 - 0.9**step) / scale + 0.01 * logits)
        p = softmax(logits)
        masses.append(p[:correct].sum())
    change = (p - before)[:correct]
    return Simulated(np.array(masses), float(change.min()), float((change > 0).mean()))
