"""Base of tasks whose questions and answers are read from disk, with a train and a test split."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from train.data.json_lines import JsonLine, read_json_lines
from train.rl.problems import digest, options
from train.rl.types import Problem, Split

_HELD = 10  # inverse of the fraction of a single file's questions that is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordProblems:
    """Base of tasks whose problems are lines of JSON with a question and an answer.

    Attributes:
        path: Folder with train.jsonl and test.jsonl, or a single file. A single file is split by
            question: a tenth of the distinct questions, those with the smallest hashes, is the test
            split.
        template: Template of the prompt, in which `{question}` is replaced by the question.
        seed: Unused, because the files determine the problems.

    Raises:
        ValueError: The template has no `{question}`, a file is missing, empty or malformed, the two
            files share questions, or a single file has only one question.
    """

    word: ClassVar[str] = ""
    path: str
    template: str = "Question: {question}\nAnswer:"
    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        if "{question}" not in self.template:
            raise ValueError(
                f"{self.word}: template={self.template!r} has no {{question}}: put it in"
            )
        object.__setattr__(self, "_rows", self._read())

    def fields(self) -> tuple[str, str]:
        """Return the names of the JSON fields of the question and of the answer."""
        return "question", "answer"

    def gold(self, answer: str, where: str) -> str:
        """Extract the right answer, with which responses are compared.

        Args:
            answer: Text of the answer's field.
            where: File and line, for error messages.

        Raises:
            ValueError: The text has no answer that can be compared.
        """
        raise NotImplementedError

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

    def _read(self) -> dict[Split, list[Problem]]:
        path = Path(self.path).expanduser()
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
            raise ValueError(
                f"{self.word}: no file {path}: give a .jsonl or a folder of train and test"
            )
        lines = read_json_lines(path, texts=self.fields())
        problems = [self._problem(line) for line in lines]
        if not problems:
            raise ValueError(f"{path} has no problems")
        return problems

    def _problem(self, line: JsonLine) -> Problem:
        question, answer = (line.fields[name] for name in self.fields())
        prompt = self.template.replace("{question}", question)
        gold = self.gold(answer, line.where)
        return Problem(f"{self.word}-{digest(question):016x}", prompt, gold)
