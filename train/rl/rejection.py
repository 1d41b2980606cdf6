"""Make data for `sft` by a policy and a verifier: python -m train.rl.rejection --weights runs/sft

Rejection fine-tuning (arXiv 2308.01825) keeps sampled answers that are right. R-Tuning (2311.09677)
relabels questions that are out of the model's knowledge. `thoughtbubbles sft --data.path
rejection.jsonl` trains on the data of either method.
"""

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from train.cli.command import run_command
from train.rl.config import RLConfig
from train.rl.environments.players import completion_of
from train.rl.job import RLJob
from train.rl.learning.penalties import Ternary
from train.rl.named_tasks import has_turns, make_task
from train.rl.probe import ProbeConfig, check_scorer, nucleus_sampler, training_problems
from train.rl.rollout.formatter import has_chat_template
from train.rl.scoring import safe_step
from train.rl.tasks.probed import read_probe
from train.rl.tasks.truthful import TruthfulTask
from train.rl.types import Problem, Trajectory
from train.runs.files import check_new_file

Line = dict[str, Any]
Data = Literal["rft", "r_tuning"]


@dataclasses.dataclass(frozen=True)
class RejectionConfig(ProbeConfig):
    """Writes conversations of a task's training problems for `sft`, by a policy and the verifier.

    "rft" samples answers and keeps the right ones; for problems out of knowledge it keeps the
    answers that abstain. "r_tuning" samples nothing: the answer is the task's own, or the phrase
    that abstains where the problem is out of knowledge. A problem is out of knowledge if the probe
    has no right answer to it, or if the task says so. "r_tuning" does not use `weights`, `keep`,
    `samples`, `temperature`, `top_p`, `max_new_tokens`, `chat`, `batch_size` and `max_rows`.

    Attributes:
        data: Kind of the data: "rft" keeps right answers of the policy (rejection fine-tuning),
            "r_tuning" relabels the task's own answers (R-Tuning).
        keep: Maximum number of different answers to a problem that are kept, in sampled order.
        probe: File of `thoughtbubbles probe` that says which problems are out of knowledge; empty
            if the task itself marks these problems.
        weights: Model that answers: a run folder, "smollm2", a Hugging Face folder, or a .gguf
            file.
        task: Task or environment with its options.
        strategy: Rollout strategy, e.g. "turns(history=False, max_observation=1024)"; the default
            is one response to a task and turns in an environment. "r_tuning" takes none.
        pool: Number of training problems, beginning with the first; None for all problems of a
            finite task.
        samples: Number of answers to each problem, of which some are kept.
        temperature: Sampling temperature of the answers.
        top_p: Cumulative probability of nucleus sampling (top-p).
        max_new_tokens: Maximum number of tokens of an answer.
        chat: Whether prompts are rendered as messages in the model's chat template.
        boxed: Whether an answer counts only inside of `\\boxed{...}`; "r_tuning" writes the box
            around its answers.
        unknown: Phrase that counts as abstaining; empty for the task's phrase, or "I don't know"
            where the task has none.
        batch_size: Number of problems whose answers are sampled at a time.
        max_rows: Maximum number of answers that are generated at a time.
        seed: Seed of the task and of the answers.
        out: New JSON Lines file, to which each conversation is appended as soon as it is found.
    """

    data: Data = "rft"
    strategy: str | None = None
    keep: int = 4
    probe: str = ""
    samples: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    out: str = "rejection.jsonl"

    def __post_init__(self):
        super().__post_init__()
        if self.data not in get_args(Data):
            raise ValueError(f"data={self.data!r}: choose {' or '.join(get_args(Data))}")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: choose 1 or more")
        if self.data == "r_tuning" and self.strategy is not None:
            raise ValueError(
                f"strategy={self.strategy!r}: data='r_tuning' samples nothing, leave it out"
            )

    @property
    def rl(self) -> RLConfig:
        return dataclasses.replace(super().rl, strategy=self.strategy)

    @property
    def reward(self) -> Any:
        """Reward shaping for `RLConfig.reward`: `scorer` for tasks of one response, else `()`.

        Episodes of an environment keep the environment's own rewards.

        Raises:
            ValueError: The task has turns, and `probe`, `boxed` or `unknown` is set.
        """
        if not has_turns(self.task):
            return self.scorer
        for name in ("probe", "boxed", "unknown"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value!r} is of tasks of one response, {self.task} has turns and its "
                    "own score: leave it out"
                )
        return ()

    @property
    def scorer(self) -> Ternary:
        """Reward shaping that scores answers by outcome; with a probe, by knowledge too."""
        knows = {"knowledge": True, "probe": self.probe} if self.probe else {}
        return Ternary(boxed=self.boxed, unknown=self.unknown, **knows)


def main(config: RejectionConfig) -> None:
    """Write the conversations to a new file, and print their number."""
    check_new_file(Path(config.out))
    if config.data == "r_tuning":  # nothing is written if a later problem has no answer
        lines: Iterable[Line] = list(relabelled(config, make_task(config.task, config.seed)))
    else:
        job = RLJob(config.rl)
        if not config.chat and has_chat_template(job.lm):
            print("these weights have a chat template, which sft uses: pass --chat to sample in it")
        lines = accepted(config, job)
    kept = save(config.out, lines)
    command = f"thoughtbubbles sft --data.path {shlex.quote(config.out)}"
    print(f"{config.out}: {kept} conversations: {command}")


def save(path: str, lines: Iterable[Line]) -> int:
    """Write conversations to a new JSON Lines file, each as soon as it is found.

    An interrupted run leaves the conversations found so far in the file.

    Args:
        path: Path of the file.
        lines: Conversations.

    Returns:
        Number of conversations.

    Raises:
        ValueError: `lines` is empty; no file is made.
        FileExistsError: The file exists.
    """
    kept = 0
    with contextlib.ExitStack() as closing:
        file = None
        for line in lines:
            if file is None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                file = closing.enter_context(Path(path).open("x", encoding="utf-8"))
            file.write(json.dumps(line) + "\n")
            file.flush()
            kept += 1
    if not kept:
        raise ValueError(
            "no sampled answer is right: nothing is written; take more samples, easier problems, "
            "or a better model"
        )
    return kept


def relabelled(config: RejectionConfig, task: Any) -> Iterator[Line]:
    """Yield conversations of R-Tuning: the task's answers, or the phrase that abstains.

    Args:
        config: Options of the data.
        task: Task of one response with a gold answer.

    Yields:
        A dict with the `uid`, the `prompt` and the `completion` of each problem.

    Raises:
        ValueError: The task has turns, neither a probe nor the task says which problems are out of
            knowledge, the probe lacks a problem, or a problem has no gold answer.
    """
    if hasattr(task, "step"):
        raise ValueError(f"data='r_tuning' is for tasks of one response, {task.name} has turns")
    if not config.probe and not hasattr(task, "out_of_knowledge"):
        raise ValueError(
            f"data='r_tuning' needs to know which problems of {task.name} are out of knowledge: "
            "give probe=FILE of `thoughtbubbles probe`"
        )
    truthful = config.scorer.of_task(task)
    for problem in _probed(config, truthful):
        gold = getattr(task, "golds", lambda problem: (problem.answer,))(problem)
        if not gold or gold[0] is None:
            raise ValueError(f"problem {problem.uid} of {task.name} has no answer: choose data=rft")
        text = truthful.phrase if truthful.out_of_knowledge(problem) else str(gold[0])
        text = f"\\boxed{{{text}}}" if config.boxed else text
        yield {"uid": problem.uid, "prompt": problem.prompt, "completion": text}


def accepted(config: RejectionConfig, job: RLJob) -> Iterator[Line]:
    """Yield conversations of rejection fine-tuning: different accepted answers of the policy.

    An answer is accepted if it is right. For a problem out of knowledge, an answer is accepted if
    it abstains.

    Args:
        config: Options of the data.
        job: Job of `config.rl`.

    Yields:
        Records as of `conversations`, from at most `config.keep` answers to each problem.

    Raises:
        ValueError: The scorer raised, or the probe lacks a problem.
    """
    sampler, strategy, task = nucleus_sampler(config, job), job.collector.strategy, job.task
    problems = list(_probed(config, task))
    limit = getattr(strategy, "max_observation", 0)
    seen = lambda text: strategy.formatter.cut(text, limit)  # noqa: E731
    history = getattr(strategy, "history", True)
    for start in range(0, len(problems), config.batch_size):
        some = problems[start : start + config.batch_size]
        counts = [config.samples] * len(some)
        rows = strategy.collect(sampler, task, some, counts, (config.seed, 0))
        check_scorer(task, rows)
        of_group: list[list[Trajectory]] = [[] for _ in some]
        for row in rows:
            of_group[row.group].append(row)
        for problem, mine in zip(some, of_group, strict=True):
            for texts in _kept(mine, task, config.keep, strategy):
                yield from conversations(task, problem, texts, config.chat, seen, history)


def _probed(config: RejectionConfig, task: Any) -> Iterator[Problem]:
    """Yield training problems; raise a `ValueError` if a given probe lacks one of them."""
    known = {one.uid for one in read_probe(config.probe)[1]} if config.probe else None
    for problem in training_problems(task, config.pool):
        if known is not None and problem.uid not in known:
            raise ValueError(
                f"probe {config.probe} has not problem {problem.uid!r} of {task.name}: probe as "
                f"many problems as pool={config.pool}"
            )
        yield problem


def _kept(rows: Sequence[Trajectory], task: Any, keep: int, strategy: Any) -> list[tuple[str, ...]]:
    """Return the first `keep` different texts of accepted episodes of a problem."""
    episodes: dict[int, list[Trajectory]] = {}
    for row in rows:
        episodes.setdefault(row.episode, []).append(row)
    found: dict[tuple[str, ...], None] = {}
    for turns in episodes.values():
        if _is_fit(turns, strategy) and _is_accepted(turns[-1], task):
            found.setdefault(tuple(text for row in turns for text in row.texts))
    return list(found)[:keep]


def _is_fit(turns: Sequence[Trajectory], strategy: Any) -> bool:
    """Return whether an episode may be trained on.

    No response may be truncated. No response may be a mistake if later prompts contain it; where
    prompts contain no earlier responses, `conversations` leaves the mistakes out instead.
    """
    for row in turns:  # `finished` describes only the last response of a row
        before = [row.tokens[:end][row.trained[:end]][-1] for end in row.begins[1:]]
        if not row.finished or any(each not in strategy.formatter.lm.stop_ids for each in before):
            return False
    last = turns[-1]
    mistaken = sum(_mistakes(last.reward.info, len(last.turn_rewards)))
    return not (mistaken and getattr(strategy, "history", True))


def _mistakes(info: Mapping[str, float], turns: int) -> tuple[int, int]:
    """Count the responses so far that were not an action, and the responses not allowed.

    Args:
        info: Info of the last turn, with `malformed` (a number) and `validity` (a fraction).
        turns: Number of turns so far.
    """
    return int(info.get("malformed", 0)), round((1 - info.get("validity", 1)) * turns)


def _is_accepted(row: Trajectory, task: Any) -> bool:
    """Return whether an episode succeeds or, for a problem out of knowledge, abstains."""
    if not isinstance(task, TruthfulTask):
        return row.reward.success
    name = "uncertain" if task.out_of_knowledge(row.problem) else "accuracy"
    return row.reward.info[name] == 1


def conversations(
    task: Any,
    problem: Problem,
    texts: Sequence[str],
    chat: bool = False,
    seen: Callable[[str], str] = lambda text: text,
    history: bool = True,
) -> Iterator[Line]:
    """Yield the records of an episode in the format that `sft` reads.

    For a chat template, an episode of several turns with history is one record of `messages`. In
    all other cases each response is a record of its `prompt` and `completion`. Without history,
    responses that were not an action, or that their prompts did not allow, are left out.

    Args:
        task: Task, or environment; an environment is stepped again for its observations.
        problem: Problem of the episode.
        texts: Responses of the episode.
        chat: Whether the records are for a chat template.
        seen: Function that truncates an observation to the part that the policy saw.
        history: Whether a prompt is all text before the response; otherwise a prompt is the last
            observation alone (`turns(history=False)`).

    Yields:
        Records with `uid`, and with `prompt` and `completion` or `messages`.
    """
    episodic = hasattr(task, "step")
    state = task.reset(problem) if episodic else None
    said, whole, mistakes = [problem.prompt], chat and episodic and history, (0, 0)
    for turn, text in enumerate(texts, 1):
        prompt, fit = "".join(said) if history else said[-1], True
        said.append(text)
        if episodic and (turn < len(texts) or not history):
            played = safe_step(task, problem, state, completion_of(problem, text))
            before, mistakes = mistakes, _mistakes(played.info, turn)
            state, fit = played.state, history or mistakes == before
            said.append(seen(played.observation))
        if not whole and fit:
            yield {"uid": problem.uid, "prompt": prompt, "completion": text}
    if whole:
        roles = ("user", "assistant")
        messages = [{"role": roles[at % 2], "content": one} for at, one in enumerate(said)]
        yield {"uid": problem.uid, "messages": messages}


def command() -> None:
    run_command(main, RejectionConfig)


if __name__ == "__main__":
    command()
