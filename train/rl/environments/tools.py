"""Tools that a policy calls within an episode, as `name(argument)`; a wrapper that adds them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from train.rl.environments.bm25 import BM25Index
from train.rl.environments.expressions import evaluate, number_text
from train.rl.environments.wrapper import EnvironmentWrapper
from train.rl.problems import answer_of
from train.rl.types import Completion, Problem, Turn


class Tool(Protocol):
    """A function that a policy calls by writing `name(argument)`.

    Attributes:
        name: Name that calls begin with.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, argument: str) -> str:
        """Output for an argument; may raise for one that it cannot take."""
        ...


@dataclasses.dataclass(frozen=True)
class CalculatorTool:
    """Values of expressions: `calc(2*(3-1))` gives `4`."""

    name: str = "calc"

    def __call__(self, argument: str) -> str:
        return number_text(evaluate(argument))


@dataclasses.dataclass(frozen=True)
class SearchTool:
    """The passages of an index that fit a query best: `search(where does Mara live)`.

    Attributes:
        index: Index of the passages.
        top: Number of passages that are given.
        name: Name that calls begin with.
    """

    index: BM25Index
    top: int = 1
    name: str = "search"

    def __call__(self, argument: str) -> str:
        found = self.index.search(argument, self.top)
        return " ".join(found) if found else "nothing found"


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What a call gave.

    Attributes:
        output: Text to show.
        failed: Whether the tool could not take the argument.
    """

    output: str
    failed: bool = False


def call_of(text: str, tools: Sequence[Tool]) -> tuple[Tool, str] | None:
    """The tool and the argument of a text that is a call and nothing else; None for others.

    Args:
        text: First line of a response.
        tools: Tools that can be called.
    """
    for tool in tools:
        if text.startswith(f"{tool.name}(") and text.endswith(")"):
            return tool, text[len(tool.name) + 1 : -1]
    return None


def run_tool(tool: Tool, argument: str, max_argument: int = 256) -> ToolResult:
    """Call a tool; whatever it raises, and too long an argument, is a failed call.

    Args:
        tool: Tool to call.
        argument: Argument of the call.
        max_argument: Greatest number of characters of an argument; a longer one never reaches the
            tool.
    """
    if len(argument) > max_argument:
        return ToolResult(f"error: {len(argument)} characters, {max_argument} at most", True)
    try:
        output = tool(argument)
    except Exception as error:  # whatever a text does to a tool, the episode goes on
        reason = " ".join(str(error).split()) or type(error).__name__
        return ToolResult(f"error: {reason[:80]}", True)
    if not isinstance(output, str):
        return ToolResult(f"error: {tool.name} gave {type(output).__name__}, no text", True)
    return ToolResult(output)


@dataclasses.dataclass(frozen=True)
class ToolState:
    """State of an episode with tools.

    Attributes:
        inner: State of the wrapped environment.
        calls: Number of calls.
        failed: Number of failed calls.
        over: Whether the episode has ended or was cut.
        info: Info of the environment's last turn, which calls repeat.
    """

    inner: Any
    calls: int = 0
    failed: int = 0
    over: bool = False
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ToolEnvironment(EnvironmentWrapper):
    """An environment with tools: a call is answered by its tool, any other text by the environment.

    A call takes none of the environment's turns. Calls beyond `max_calls` go to the environment as
    any text does, so an episode ends. The metrics get `tool_calls` and `tool_errors`.

    Attributes:
        environment: Environment to wrap.
        tools: Tools that can be called, by the first of a name.
        max_calls: Greatest number of calls of an episode.
        tool_reward: Reward of a call that gave a result.
        max_argument: Greatest number of characters of a call's argument.
    """

    tools: Sequence[Tool]
    max_calls: int = 4
    tool_reward: float = 0.0
    max_argument: int = 256

    def __post_init__(self):
        for name, least in (("max_calls", 0), ("max_argument", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: choose {least} or more")
        if not math.isfinite(self.tool_reward):
            raise ValueError(f"tool_reward={self.tool_reward}: choose a finite number")

    @property
    def name(self) -> str:
        tools = "+".join(tool.name for tool in self.tools)
        return f"{self.environment.name} with {tools}"

    @property
    def max_turns(self) -> int | None:
        """Greatest number of turns of an episode; None where the environment says none."""
        turns = super().max_turns
        return None if turns is None else turns + self.max_calls

    def reset(self, problem: Problem) -> ToolState:
        return ToolState(self.environment.reset(problem))

    def step(self, state: ToolState, action: Completion) -> Turn:
        """Turn after a call, or after an action of the environment.

        Raises:
            ValueError: The episode is over.
        """
        if state.over:
            raise ValueError(f"{self.name}: the episode is over: reset before the next step")
        call = call_of(answer_of(action.text), self.tools)
        if call is None or state.calls >= self.max_calls:
            turn = self.environment.step(state.inner, action)
            no_calls = " no calls left" if call else ""
            state = dataclasses.replace(
                state,
                inner=turn.state,
                over=turn.terminated or turn.truncated,
                info=turn.info,
            )
            return dataclasses.replace(
                turn, state=state, observation=no_calls + turn.observation, info=_info(state)
            )
        result = run_tool(*call, self.max_argument)
        state = dataclasses.replace(
            state, calls=state.calls + 1, failed=state.failed + result.failed
        )
        reward = 0.0 if result.failed else self.tool_reward
        return Turn(state, f" {result.output} ", reward, False, info=_info(state))


def _info(state: ToolState) -> Mapping[str, float]:
    return {**state.info, "tool_calls": float(state.calls), "tool_errors": float(state.failed)}
