"""The interface of a fork policy: its input, its required methods, and its optional ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax

from thoughtbubbles.short_repr import ShortRepr

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Candidates(ShortRepr):
    """Input of a policy: two candidates of each of `S` streams, `[fork_0, keep_0, fork_1, ...]`.

    Attributes:
        log_score: `[B, 2S]` float32, cumulative log-score of each candidate.
        token: `[B, 2S]` int32, index of the input token that the candidate belongs to.
        alive: `[B, 2S]` bool, false for candidates of dead slots, which come last.
        forced: `[B, 2S]` bool, candidates that must be kept: the keep candidate of each original.
        length: `[B]` int32, number of real tokens in the row.
        first: `[B]` int32, number of tokens of the sequence before the row's token 0; 0 except in
            cached decoding.
        num_tokens: Static number `T` of tokens in a row, padding included.
        threshold: Float32 scalar, the fork layer's tracked threshold on scores p, or None.
    """

    log_score: jax.Array
    token: jax.Array
    alive: jax.Array
    forced: jax.Array
    length: jax.Array
    first: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})
    threshold: jax.Array | None = None


class Policy(Protocol):
    """Choice of candidates: a policy keeps every forced one, and at most `capacity(T)` in all.

    The optional methods of a policy are those of `PolicyDefaults`.
    """

    @property
    def causal(self) -> bool:
        """Whether the choice among a token's candidates depends on tokens up to it alone."""
        ...

    def capacity(self, num_tokens: int) -> int:
        """Largest number of streams of a row of `num_tokens` tokens, a Python int."""
        ...

    def keep(self, candidates: Candidates) -> Bool[Array, "B 2*S"]:
        """Mask of the candidates to keep."""
        ...


class PolicyDefaults:
    """Optional methods of a policy, with their defaults.

    A policy that inherits from this class, or has none of these methods, tracks no statistics of
    training, does not explore, and leaves the scores of streams as they are.
    """

    def init_tracked(self) -> float | None:
        """Initial value of a scalar that each fork layer tracks in training; None tracks nothing.

        The scalar is no parameter; it is saved in checkpoints, and `Candidates.threshold` is its
        value.
        """
        return None

    def track(self, candidates: Candidates) -> Float[Array, ""] | None:
        """The tracked scalar after a forward pass of training, from the candidates of that pass.

        Args:
            candidates: Candidates of all rows, with the scalar's present value in `threshold`.
        """
        return candidates.threshold

    def explore(self, candidates: Candidates, key: jax.Array) -> Candidates:
        """The candidates that `keep` is given in a forward pass of training.

        Args:
            candidates: Candidates as the fork layer scored them.
            key: Random key of this fork layer and step.
        """
        del key
        return candidates

    def scores(self, candidates: Candidates) -> Float[Array, "B 2*S"]:
        """Float32 log-scores that kept candidates go on with."""
        return candidates.log_score


def hook(policy: Policy, name: str) -> Callable[..., Any]:
    """The policy's method of that name, or that of `PolicyDefaults` where it has none."""
    return getattr(policy, name, None) or getattr(PolicyDefaults(), name)


@runtime_checkable
class CausalPolicy(Policy, Protocol):
    """A policy that can choose part by part, which a cache needs.

    `keep_next` over the tokens of a row in any parts must keep what `keep` over the row keeps.
    """

    def init_state(self, batch: int, num_candidates: int) -> Any:
        """The policy's state before the first token, any pytree of arrays `[batch, ...]`.

        Args:
            batch: Number of rows.
            num_candidates: Upper bound on the candidates of a whole sequence. A larger bound may
                only append unused entries to the arrays of a smaller one.
        """
        ...

    def keep_next(self, candidates: Candidates, state: Any) -> tuple[Bool[Array, "B 2*S"], Any]:
        """Mask of the next tokens' candidates to keep, and the state after these tokens."""
        ...


def check_policy(policy: Any, name: str) -> None:
    """Raise a ValueError if an object or a class lacks what every policy has.

    Args:
        policy: The policy, or its class.
        name: What it is called in the message.
    """
    given = {*dir(policy), *getattr(policy, "__dataclass_fields__", ())}
    missing = [part for part in ("causal", "capacity", "keep") if part not in given]
    if missing:
        raise ValueError(
            f"{name} is no fork policy, it has no {', no '.join(missing)}: give an object such as "
            "PrefixRank(ratio=2.0), or write what is missing (thoughtbubbles.policy.Policy)"
        )


def check_forced_keep(policy: Policy, forced_keep: bool, score_originals: bool) -> None:
    """Raise a ValueError if originals are to compete by score and can't, or the policy is none."""
    if isinstance(policy, type):
        raise ValueError(
            f"policy={policy!r} is no fork policy: give an object such as PrefixRank(ratio=2.0)"
        )
    check_policy(policy, f"policy={policy!r}")
    if not forced_keep and (policy.causal or not score_originals):
        raise ValueError(
            f"forced_keep=False lets originals compete by score, which policy={policy} and "
            f"score_originals={score_originals} rule out: set TopK(...) and score_originals=True"
        )
