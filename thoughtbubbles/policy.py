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
    """Choice of the candidates to keep: all forced ones, and at most `capacity(T)` in a row.

    A policy may also have the methods of `PolicyDefaults`, which are optional.
    """

    @property
    def causal(self) -> bool:
        """Whether the choice among a token's candidates depends on tokens up to it alone."""
        ...

    def capacity(self, num_tokens: int) -> int:
        """Return the maximum number of streams of a row of `num_tokens` tokens, a Python int."""
        ...

    def keep(self, candidates: Candidates) -> Bool[Array, "B 2*S"]:
        """Return the mask of the candidates to keep."""
        ...


class PolicyDefaults:
    """Optional methods of a policy, with their defaults.

    A policy may inherit from this class, or leave the methods out. By default it tracks no
    statistics of training, does not explore, and leaves the scores of streams as they are.
    """

    def init_tracked(self) -> float | None:
        """Return the initial value of a scalar that each fork layer tracks in training, or None.

        The scalar is not a trained parameter. It is saved in checkpoints, and a policy finds its
        value in `Candidates.threshold`. None tracks nothing.
        """
        return None

    def track(self, candidates: Candidates) -> Float[Array, ""] | None:
        """Return the new value of the tracked scalar after a forward pass of training.

        Args:
            candidates: Candidates of all rows of the pass, with the old value in `threshold`.
        """
        return candidates.threshold

    def explore(self, candidates: Candidates, key: jax.Array) -> Candidates:
        """Return the candidates to pass to `keep` in training, such as with noise on their scores.

        Args:
            candidates: Candidates as the fork layer scored them.
            key: Random key of this fork layer and step.
        """
        del key
        return candidates

    def scores(self, candidates: Candidates) -> Float[Array, "B 2*S"]:
        """Return float32 log-scores for the streams that kept candidates become."""
        return candidates.log_score


def hook(policy: Policy, name: str) -> Callable[..., Any]:
    """Return the policy's method of that name, or the one of `PolicyDefaults` if it has none."""
    return getattr(policy, name, None) or getattr(PolicyDefaults(), name)


@runtime_checkable
class CausalPolicy(Policy, Protocol):
    """A policy that can choose for one part of a row after the other, which a cache needs.

    However a row is split into parts, calls of `keep_next` for its parts must keep the candidates
    that `keep` keeps for the whole row.
    """

    def init_state(self, batch: int, num_candidates: int) -> Any:
        """Return the policy's state before the first token, any pytree of arrays `[batch, ...]`.

        Args:
            batch: Number of rows.
            num_candidates: Upper bound on the number of candidates of a whole sequence. The state
                for a larger bound must be the state for a smaller one with unused entries appended.
        """
        ...

    def keep_next(self, candidates: Candidates, state: Any) -> tuple[Bool[Array, "B 2*S"], Any]:
        """Return the mask of the next tokens' candidates to keep, and the state after them."""
        ...


def check_policy(policy: Any, name: str) -> None:
    """Raise a ValueError if an object or a class lacks a member that `Policy` requires.

    Args:
        policy: The policy, or its class.
        name: Name of the policy in the message.
    """
    fields = getattr(policy, "__dataclass_fields__", ())
    parts = ("causal", "capacity", "keep")
    missing = [part for part in parts if not hasattr(policy, part) and part not in fields]
    if missing:
        raise ValueError(
            f"{name} is no fork policy, it has no {', no '.join(missing)}: give an object such as "
            "PrefixRank(ratio=2.0), or write what is missing (thoughtbubbles.policy.Policy)"
        )


def check_forced_keep(policy: Policy, forced_keep: bool, score_originals: bool) -> None:
    """Raise a ValueError for an invalid policy, or one that must always keep the originals."""
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
