"""How many rollouts each problem gets."""

from collections.abc import Sequence
from typing import Any


class Uniform:
    """The same number for each problem; one more for the first ones where it does not divide."""

    def plan(self, uids: Sequence[str], total: int) -> list[int]:
        """Rollouts of each problem, `total` together."""
        each, left = divmod(total, len(uids))
        return [each + (index < left) for index in range(len(uids))]

    def observe(self, uid: str, successes: Sequence[bool]) -> None:
        """Nothing is remembered."""

    @property
    def state(self) -> Any:
        """Nothing."""
        return None

    def restore(self, state: Any) -> None:
        """Nothing."""
