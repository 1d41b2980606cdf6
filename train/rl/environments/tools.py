"""Tools that a policy calls by writing `name(argument)`, and a wrapper that adds them."""

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
        name: Name of the tool, which calls begin with.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, argument: str) -> str:
        """Return the output for an argument; may raise for an invalid argument."""
        ...


@dataclasses.dataclass(frozen=True)
class CalculatorTool:
    """Tool that evaluates arithmetic expressions: `calc(2*(3-1))` gives `4`.

    Attributes:
        name: Name of the tool, which calls begin with.
    """

    name: str = "calc"

    def __call__(self, argument: str) -> str:
        return number_text(evaluate(argument))


@dataclasses.dataclass(frozen=True)
class SearchTool:
    """Tool that returns the passages with the best scores: `search(where does Mara live)`.

    Attributes:
        index: Index of the passages.
        top: Maximum number of passages in an output.
        name: Name of the tool, which calls begin with.
    """

    index: BM25Index
    top: int = 1
    name: str = "search"

    def __call__(self, argument: str) -> str:
        found = self.index.search(argument, self.top)
        return " ".join(found) if found else "nothing found"


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """Result of a tool call.

    Attributes:
        output: Output of the tool, or an error message.
        failed: Whether the call failed.
    """

    output: str
    failed: bool = False


def call_of(text: str, tools: Sequence[Tool]) -> tuple[Tool, str] | None:
    """Parse a text as a tool call `name(argument)`.

    Args:
        text: First line of a response.
        tools: Tools that can be called.

    Returns:
        The tool and the argument, or None if the whole text is not a call of one of the tools.
    """
    for tool in tools:
        if text.startswith(f"{tool.name}(") and text.endswith(")"):
            return tool, text[len(tool.name) + 1 : -1]
    return None


def run_tool(tool: Tool, argument: str, max_argument: int = 256) -> ToolResult:
    """Call a tool; errors become a failed result with a message as output, never an exception.

    A call fails if the tool raises, if its output is not a text, or if the argument is too long.

    Args:
        tool: Tool to call.
        argument: Argument of the call.
        max_argument: Maximum number of characters of the argument; the tool is not called with a
            longer one.
    """
    if len(argument) > max_argument:
        return ToolResult(f"error: {len(argument)} characters, {max_argument} at most", True)
    try:
        output = tool(argument)
    except (Exception, SystemExit) as error:  # whatever a text does to a tool, the episode goes on
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
        calls: Number of tool calls so far.
        failed: Number of tool calls so far that failed.
        over: Whether the episode was terminated or truncated.
        info: Info of the wrapped environment's last turn, repeated in turns with tool calls.
    """

    inner: Any
    calls: int = 0
    failed: int = 0
    over: bool = False
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ToolEnvironment(EnvironmentWrapper):
    """An environment with tools: a call is answered by its tool, any other text by the environment.

    A call does not use up one of the wrapped environment's turns. After `max_calls` calls, further
    calls are passed to the environment like any other text. The info of each turn counts calls as
    `tool_calls` and failed calls as `tool_errors`.

    Attributes:
        environment: Environment to wrap.
        tools: Tools that can be called; if several tools have the same name, the first is called.
        max_calls: Maximum number of calls in an episode.
        tool_reward: Reward of a call that did not fail.
        max_argument: Maximum number of characters of a call's argument; a longer call fails.

    Raises:
        ValueError: `max_calls` is below 0, `max_argument` is below 1, or `tool_reward` is not
            finite.
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
        """Maximum number of turns, including calls; None if the environment has no maximum."""
        turns = super().max_turns
        return None if turns is None else turns + self.max_calls

    def reset(self, problem: Problem) -> ToolState:
        return ToolState(self.environment.reset(problem))

    def step(self, state: ToolState, action: Completion) -> Turn:
        """Return the turn after a tool call, or after an action of the wrapped environment.

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
