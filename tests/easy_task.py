"""A task whose every answer is right: `--plugin easy_task` of commands that tests start."""

import dataclasses
from typing import ClassVar

from train.rl.tasks import TASKS
from train.rl.tasks.strings import Copy
from train.rl.types import Completion, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Easy(Copy):
    """Copying, where anything is a copy."""

    word: ClassVar[str] = "easy"

    def score(self, completion: Completion) -> Reward:
        return dataclasses.replace(super().score(completion), value=1.0, success=True)


TASKS["easy"] = Easy
