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
    """Input of a policy: scores and tokens of the fork and keep candidates of `S` streams in a row.

    Axis 1 of the `[B, 2S]` arrays has the order `[fork_0, keep_0, fork_1, keep_1, ...]`: the fork
    candidate of the stream in slot `s` has index `2 * s`, its keep candidate index `2 * s + 1`.

    Attributes:
        log_score: `[B, 2S]` float32, cumulative log-score of each candidate.
        token: `[B, 2S]` int32, index in the row of the input token of each candidate.
        alive: `[B, 2S]` bool, false for the candidates of dead slots, which come last.
        forced: `[B, 2S]` bool, whether the policy must keep each candidate: true for the keep
            candidates of originals.
        length: `[B]` int32, number of real tokens in the row.
        first: `[B]` int32, number of tokens of the sequence before the row's token 0; 0 except in
            cached decoding.
        num_tokens: Static number `T` of tokens in a row, padding included.
        threshold: Float32 scalar, threshold on scores p that the fork layer tracks; None if its
            policy tracks none.
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
    """Interface of a policy, which chooses the candidates that a fork layer keeps.

    The policy must keep all forced candidates, and at most `capacity(T)` candidates in a row of `T`
    tokens. It may also have the methods of `PolicyDefaults`, which are optional.
    """

    @property
    def causal(self) -> bool:
        """Whether the choice among a token's candidates depends on no later token."""
        ...

    def capacity(self, num_tokens: int) -> int:
        """Return the maximum number of streams per row of `num_tokens` tokens, a Python int."""
        ...

    def keep(self, candidates: Candidates) -> Bool[Array, "B 2*S"]:
        """Return whether to keep each candidate."""
        ...


class PolicyDefaults:
    """Optional methods of a policy, with their defaults.

    A policy may inherit from this class, or leave the methods out. By default, a policy tracks no
    threshold in training, does not explore, and does not change the scores of streams.
    """

    def init_tracked(self) -> float | None:
        """Return the initial value of a scalar that each fork layer tracks in training, or None.

        The scalar is not a trained parameter, but is saved in checkpoints. `Candidates.threshold`
        passes its value to the policy. None tracks nothing.
        """
        return None

    def track(self, candidates: Candidates) -> Float[Array, ""] | None:
        """Return the new value of the tracked scalar, once in each forward pass of training.

        Args:
            candidates: Candidates of all rows of the batch, with the old value in `threshold`.
        """
        return candidates.threshold

    def explore(self, candidates: Candidates, key: jax.Array) -> Candidates:
        """Return the candidates for `keep` in training, for example with noise on their scores.

        Args:
            candidates: Candidates with the scores of the fork layer.
            key: PRNG key, another one for each fork layer and training step.
        """
        del key
        return candidates

    def scores(self, candidates: Candidates) -> Float[Array, "B 2*S"]:
        """Return the float32 log-score that each candidate's stream gets if it is kept."""
        return candidates.log_score


def hook(policy: Policy, name: str) -> Callable[..., Any]:
    """Return the policy's method `name`, or that of `PolicyDefaults` if the policy has none."""
    return getattr(policy, name, None) or getattr(PolicyDefaults(), name)


@runtime_checkable
class CausalPolicy(Policy, Protocol):
    """Interface of a causal policy that can process a row in consecutive parts, for caches.

    For any split of a row into parts, calls of `keep_next` on the parts must keep the same
    candidates as one call of `keep` on the whole row.
    """

    def init_state(self, batch: int, num_candidates: int) -> Any:
        """Return the policy's state before the first token, any pytree of arrays `[batch, ...]`.

        Args:
            batch: Number of rows.
            num_candidates: Upper bound on the number of candidates of a whole sequence. The state
                for a larger bound must equal that for a smaller bound with unused entries appended.
        """
        ...

    def keep_next(self, candidates: Candidates, state: Any) -> tuple[Bool[Array, "B 2*S"], Any]:
        """Return whether to keep each candidate of the next tokens, and the state after them.

        Args:
            candidates: Candidates of the next tokens of each row.
            state: State after the earlier tokens, from `init_state` or the last call.
        """
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
    """Raise a ValueError for an invalid policy, or if originals must not compete by their scores.

    Args:
        policy: Policy of a fork layer.
        forced_keep: Whether originals are always kept, as causal policies require.
        score_originals: Whether originals have a learned score, required without `forced_keep`.
    """
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
