"""What a fork policy is: what it sees, what it must do, and what it may do."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """What a policy sees: two candidates for each of `S` streams, `[fork_0, keep_0, fork_1, ...]`.

    Attributes:
        log_score: `[B, 2S]` float32, cumulative log-score of each candidate.
        token: `[B, 2S]` int32, index of the input token that the candidate belongs to.
        alive: `[B, 2S]` bool, false for candidates of dead slots (they stand last).
        forced: `[B, 2S]` bool, candidates that must be kept: the keep candidate of each original.
        length: `[B]` int32, number of real tokens in the row.
        first: `[B]` int32, how many tokens of the sequence stand before the row's token 0 (0 but
            in cached decoding).
        num_tokens: `T`, the static number of token places in a row.
        threshold: float32 scalar, the fork layer's tracked threshold on scores p, or None.
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
    """Chooses candidates. Must keep every forced one and at most `capacity(T)` in all.

    What else a policy may do is in `PolicyDefaults`, whose methods it can have too.
    """

    @property
    def causal(self) -> bool:
        """Whether the fate of a token's candidates depends on tokens up to it alone."""
        ...

    def capacity(self, num_tokens: int) -> int:
        """Static number of slots that a row of `num_tokens` tokens can fill."""
        ...

    def keep(self, candidates: Candidates) -> jax.Array:
        """Keep mask over the candidates, `[B, 2S]` bool."""
        ...


class PolicyDefaults:
    """What a policy may do beyond choosing, and does not unless it says so.

    A policy that inherits from this class, or has none of these methods, tracks nothing, explores
    nothing, and lets streams go on with the scores that they were chosen by.
    """

    def init_tracked(self) -> float | None:
        """First value of a scalar that each fork layer tracks in training; None for no such state.

        It is neither a parameter nor trained: checkpoints hold it, and `Candidates.threshold` is
        its value.
        """
        return None

    def track(self, candidates: Candidates) -> jax.Array | None:
        """The tracked scalar after a forward pass of training, from the candidates of that pass.

        Args:
            candidates: Candidates of all rows, the present value in `threshold`.
        """
        return candidates.threshold

    def explore(self, candidates: Candidates, key: jax.Array) -> Candidates:
        """Candidates by which a forward pass of training chooses; `keep` sees these.

        Args:
            candidates: Candidates as the fork layer scored them.
            key: Random key of this fork layer and step.
        """
        del key
        return candidates

    def scores(self, candidates: Candidates) -> jax.Array:
        """Log-scores `[B, 2S]` float32 that kept candidates go on with."""
        return candidates.log_score


def hook(policy: Policy, name: str) -> Callable[..., Any]:
    """The policy's method of that name, or that of `PolicyDefaults` where it has none."""
    return getattr(policy, name, None) or getattr(PolicyDefaults(), name)


@runtime_checkable
class CausalPolicy(Policy, Protocol):
    """A policy that can go on where it stopped, which is what a cache needs.

    `keep` over a whole row must equal `keep_next` over its tokens in any parts.
    """

    def memory(self, batch: int, num_candidates: int) -> Any:
        """What `keep_next` needs before the first token: any pytree of arrays `[batch, ...]`.

        Args:
            num_candidates: bound on the candidates of a whole sequence. A larger one may only add
                unused places behind those of a smaller one.
        """
        ...

    def keep_next(self, candidates: Candidates, memory: Any) -> tuple[jax.Array, Any]:
        """Keep mask over the candidates of the next tokens, and the memory after them."""
        ...


def check_forced_keep(policy: Policy, forced_keep: bool, score_originals: bool) -> None:
    """Raise where originals are to compete by score and can't."""
    if not forced_keep and (policy.causal or not score_originals):
        raise ValueError(
            f"forced_keep=False lets originals compete by score, with policy={policy} and "
            f"score_originals={score_originals} they can't: set TopK(...) and True"
        )
