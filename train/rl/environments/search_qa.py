"""Environment of questions about a local corpus, with a search tool."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from train.data.json_lines import read_json_lines
from train.rl.environments.bm25 import BM25Index, words_of
from train.rl.environments.questions import QuestionWithTools
from train.rl.environments.tools import SearchTool
from train.rl.problems import at_least, at_most, digest
from train.rl.types import Problem

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchQA(QuestionWithTools):
    """Question answering by search: `search(Mara)` shows the passage with the best BM25 score.

    A text that is not a tool call is the final answer and ends the episode. Answers are compared
    without regard to case and final dots. The default corpus is synthetic and the same for every
    seed: people live in towns, and each town has a river. `Which river is in the town of Mara?`
    takes two searches. The option `path` replaces this corpus by the files of a folder:
    `passages.jsonl` with a `text` in each line, and `questions.jsonl` with a `question` and an
    `answer` in each line; a question that occurs twice is in one split only. The scripted player
    searches for the last word of the question (with `path` or `hops=1`, for the whole question).
    With `hops=2` it then searches for `river` and the last word of the result. The last word of the
    last result is the answer of the player.

    Attributes:
        people: Number of people in the synthetic corpus.
        hops: Number of passages that a synthetic question needs: 1 asks for a person's town, 2 for
            the river of the town.
        path: Folder with a corpus and questions of your own; empty for the synthetic corpus.
        top: Number of passages that a search shows.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (an empty text), which uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
        max_argument: Maximum number of characters of a call's argument; a longer call fails.
    """

    word: ClassVar[str] = "search_qa"
    people: int = 100
    hops: int = 2
    path: str = ""
    top: int = 1
    max_turns: int = 6

    def check(self) -> None:
        at_least(self, people=5, top=1, max_argument=1)
        at_most(self, people=10_000, top=100)
        if self.hops not in (1, 2):
            raise ValueError(f"search_qa: hops={self.hops}: choose 1 or 2")

    def prepare(self) -> None:
        passages, questions = self._from_files() if self.path else self._made_up()
        object.__setattr__(self, "_tools", (SearchTool(BM25Index(passages), self.top),))
        object.__setattr__(self, "_questions", questions)
        # The first answer of each question, which decides the split of all of its answers.
        object.__setattr__(self, "_first", dict(reversed(questions)))

    @property
    def tools(self) -> tuple[SearchTool]:
        return self.__dict__["_tools"]

    def draw(self, rng: np.random.Generator) -> tuple[list[str], str]:
        questions: list[list[str]] = self.__dict__["_questions"]
        return questions[rng.integers(len(questions))], "own" if self.path else f"{self.hops} hops"

    def split_key(self, drawn: tuple[Any, ...]) -> str:
        question = drawn[0][0]
        return super().split_key(([question, self.__dict__["_first"][question]],))

    def made(self, drawn: tuple[Any, ...]) -> Problem:
        uid = f"{self.word}-{digest(super().split_key(drawn)):016x}"  # not of all of its answers
        return dataclasses.replace(super().made(drawn), uid=uid)

    def _answered(self, game: Any, said: str) -> Any:
        if _plain(said) == _plain(game.answer):
            said = game.answer
        return super()._answered(game, said)

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        passages = self.tools[0].index.passages
        words = words_of(passages[rng.integers(len(passages))]) or ["nothing"]
        word = words[rng.integers(len(words))]
        return f"search({word})" if rng.random() < 0.5 else word

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        last = words_of(shown[-1])[-1]
        if len(shown) == 1:
            # With hops=1 the last word, "live", names nobody.
            return f"search({shown[0].strip() if self.path or self.hops == 1 else last})"
        if len(shown) < 1 + 2 * self.hops:
            return f"search(river {last})"
        return last

    def _made_up(self) -> tuple[list[str], list[list[str]]]:
        rng = np.random.default_rng(self.people)
        size = 2 + self.people // 4
        names = _names(rng, self.people + 2 * size)
        people, towns, rivers = np.split(np.array(names), [self.people, self.people + size])
        homes = rng.integers(0, size, self.people)
        living = list(zip(people, homes, strict=True))
        passages = [f"{name} lives in {towns[home]}." for name, home in living]
        passages += [
            f"The river of {town} is {river}." for town, river in zip(towns, rivers, strict=True)
        ]
        questions = [
            [f"Which river is in the town of {name}?", str(rivers[home])]
            if self.hops == 2
            else [f"Where does {name} live?", str(towns[home])]
            for name, home in living
        ]
        return [passages[i] for i in rng.permutation(len(passages))], questions

    def _from_files(self) -> tuple[list[str], list[list[str]]]:
        folder = Path(self.path).expanduser()
        files = {name: folder / f"{name}.jsonl" for name in ("passages", "questions")}
        for file in files.values():
            if not file.is_file():
                raise ValueError(
                    f"search_qa: no file {file}: give a folder with passages.jsonl and "
                    "questions.jsonl"
                )
        passages = [line.fields["text"] for line in read_json_lines(files["passages"], ("text",))]
        lines = read_json_lines(files["questions"], texts=("question", "answer"))
        questions = [[line.fields["question"], line.fields["answer"]] for line in lines]
        if not passages or not questions:
            raise ValueError(f"search_qa: {folder} has no passages or no questions: write some")
        return passages, questions


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Make `count` different random names of six letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = [
            _CONSONANTS[rng.integers(len(_CONSONANTS))] + _VOWELS[rng.integers(len(_VOWELS))]
            for _ in range(3)
        ]
        found["".join(letters).capitalize()] = None
    return list(found)
