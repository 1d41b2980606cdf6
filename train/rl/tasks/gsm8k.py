"""Word problems in GSM8K's format, from disk."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from train.data.json_lines import JsonLine, read_json_lines
from train.rl.problems import digest, options
from train.rl.tasks.numbers import answers_after_mark, final_number, number_text, read_number
from train.rl.tasks.shaping import format_bonus
from train.rl.types import Completion, Problem, Reward, Split

_HELD = 10  # of a single file, one question of so many is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K:
    """Word problems, lines of `{"question": ..., "answer": "... #### 72"}`.

    Numbers are compared exactly, as fractions (`numbers.read_number`); an answer of the file that
    is not one number stops the run.

    Attributes:
        path: Folder with train.jsonl and test.jsonl, or one file, a tenth of whose questions are
            held out, by rank of a hash.
        template: Prompt, in which `{question}` stands for the question.
        bonus: Addition to the reward for a number after `####`, right or wrong.
        seed: Unused; the files determine all.
    """

    word: ClassVar[str] = "gsm8k"
    path: str
    template: str = "Question: {question}\nAnswer:"
    bonus: float = 0.0
    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        if "{question}" not in self.template:
            raise ValueError(f"gsm8k: template={self.template!r} has no {{question}}: put it in")
        object.__setattr__(self, "_rows", self._read())

    @property
    def name(self) -> str:
        return self.word + options(self)

    @property
    def _problems(self) -> dict[Split, list[Problem]]:
        return getattr(self, "_rows")  # noqa: B009 (frozen: set past the fields)

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return {split: len(problems) for split, problems in self._problems.items()}

    def problem(self, split: Split, index: int) -> Problem:
        return self._problems[split][index]

    def score(self, completion: Completion) -> Reward:
        """1 where the text's final number is the answer's."""
        right = final_number(completion.text) == completion.problem.answer
        reward = Reward(float(right), right)
        if not self.bonus:
            return reward
        return format_bonus(reward, answers_after_mark(completion.text), self.bonus)

    def _read(self) -> dict[Split, list[Problem]]:
        path = Path(self.path)
        if path.is_dir():
            train, test = self._file(path / "train.jsonl"), self._file(path / "test.jsonl")
            both = {problem.prompt for problem in train} & {problem.prompt for problem in test}
            if both:
                raise ValueError(
                    f"{path}: train.jsonl and test.jsonl share {len(both)} questions: "
                    "take them out of one"
                )
            return {"train": train, "test": test}
        problems = self._file(path)
        prompts = sorted({problem.prompt for problem in problems}, key=lambda p: (digest(p), p))
        if len(prompts) < 2:
            raise ValueError(f"{path} has one question: give two or more, so one can be held out")
        held = set(prompts[: max(1, len(prompts) // _HELD)])
        return {
            "train": [problem for problem in problems if problem.prompt not in held],
            "test": [problem for problem in problems if problem.prompt in held],
        }

    def _file(self, path: Path) -> list[Problem]:
        if not path.is_file():
            raise ValueError(f"gsm8k: no file {path}: give a .jsonl or a folder of train and test")
        lines = read_json_lines(path, texts=("question", "answer"))
        problems = [self._problem(line) for line in lines]
        if not problems:
            raise ValueError(f"{path} has no problems")
        return problems

    def _problem(self, line: JsonLine) -> Problem:
        question, answer = line.fields["question"], line.fields["answer"]
        _, mark, after = answer.rpartition("####")
        number = read_number(after) if mark else None
        if number is None:
            found = f"ends in {'####' + after[:40]!r}" if mark else "has no ####"
            raise ValueError(f"{line.where}: the answer {found}: end it in `#### number`")
        prompt = self.template.replace("{question}", question)
        return Problem(f"gsm8k-{digest(question):016x}", prompt, number_text(number))
