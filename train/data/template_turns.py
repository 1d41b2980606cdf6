"""Render all beginnings of a conversation in one pass through its chat template.

Most templates go through the messages in one loop, and then open the model's answer. Such a
template is compiled with what follows the loop at the end of the loop's body, so that one pass
gives the text of each beginning. Meanwhile `Turns` stands for the list of messages, and refuses
every look at what a shorter conversation would not have: later messages, the number of messages,
`loop.last`. So the texts are those of separate passes, or the template is rendered separately.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes

from train.data.template_limits import LimitedEnvironment

_ASKS = "add_generation_prompt"
_FOREIGN = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)
_STATEFUL = {"joiner", "cycler"}  # each call of what they return changes it
_LAZY = {"map", "select", "reject", "selectattr", "rejectattr", "reverse", "items", "batch",
         "slice", "unique"}  # fmt: skip
"""Filters whose result can be read only once."""


class LookaheadError(BaseException):
    """A template looks beyond the current message. Not an `Exception`, which Jinja would catch."""


class Turns:
    """The messages, for a template that renders all beginnings of a conversation.

    Args:
        messages: Messages of the conversation.
        wanted: Mapping from the index of a message to the values of `add_generation_prompt` for
            which the text of the conversation up to this message is wanted.
    """

    def __init__(self, messages: Sequence[Any], wanted: Mapping[int, Sequence[bool]]):
        self._messages, self._wanted = messages, wanted
        self._current = 0
        self._begun, self._read, self._closing = False, True, False
        self._parts: list[str] = []
        self._ends: dict[tuple[int, bool], tuple[int, str]] = {}

    def __iter__(self) -> Iterator[Any]:
        if self._begun:  # another loop
            raise LookaheadError
        self._begun = True
        for index, message in enumerate(self._messages):
            if not self._read:  # loop.last, or a message that is passed over
                raise LookaheadError
            self._current = index
            self._read = self._closing = False
            yield message
        if not self._read:
            raise LookaheadError

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and self._closing and index < 0:
            index += self._current + 1
        if type(index) is not int or not 0 <= index <= self._current:
            raise LookaheadError
        return self._messages[index]

    def __len__(self) -> int:
        if not self._closing:
            raise LookaheadError
        return self._current + 1

    def __bool__(self) -> bool:
        return True

    def _refuse(self, *_: Any) -> Any:
        raise LookaheadError

    __getattr__ = __contains__ = __reversed__ = __eq__ = __ne__ = __str__ = __repr__ = _refuse
    __hash__ = None  # pyright: ignore

    def _close(self) -> Iterator[bool]:
        """Yield the wanted values of `add_generation_prompt`, and take what follows each one."""
        self._closing = True
        body = len(self._parts)
        for asks in self._wanted.get(self._current, ()):
            yield asks
            self._ends[self._current, asks] = body, "".join(self._parts[body:])
            del self._parts[body:]
        self._read = True

    def _render(self, chunks: Iterator[str]) -> Callable[[int, bool], str] | None:
        for chunk in chunks:
            self._parts.append(chunk)
        if not self._read or self._current + 1 < len(self._messages):  # left by a break
            return None
        lengths = [0]
        for part in self._parts:
            lengths.append(lengths[-1] + len(part))
        whole = "".join(self._parts)

        def text(count: int, asks: bool) -> str:
            parts, end = self._ends[count - 1, asks]
            return whole[: lengths[parts]] + end

        return text


def beginnings(
    template: str,
    given: Mapping[str, Any],
    wanted: Mapping[int, Sequence[bool]],
    **functions: Any,
) -> Callable[[int, bool], str] | None:
    """Render the wanted beginnings of a conversation in one pass.

    Args:
        template: Jinja template.
        given: Variables of the template, among them `messages`.
        wanted: Mapping from the index of a message to the values of `add_generation_prompt` for
            which the text up to this message is wanted.
        functions: Functions that the template may call.

    Returns:
        Function from a number of messages and the value of `add_generation_prompt` to the text, or
        None for a template that cannot be rendered in one pass or fails; it says why if it is
        rendered on its own.
    """
    try:
        compiled = _compiled(template)
        if compiled is None:
            return None
        turns = Turns(given["messages"], wanted)
        context = compiled.new_context({**given, "messages": turns, **functions})
        return turns._render(compiled.root_render_func(context))
    except (Exception, LookaheadError):  # a template can raise whatever Python can
        return None


class _Environment(LimitedEnvironment):
    def close(self, turns: Any) -> Iterator[bool]:
        if not isinstance(turns, Turns):
            raise LookaheadError
        return turns._close()


@functools.cache
def _environment() -> _Environment:
    return _Environment()


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template | None:
    environment = _environment()
    tree = environment._parse(template, None, None)
    loops = [node for node in tree.body if isinstance(node, nodes.For)]
    if len(loops) != 1:
        return None
    [loop] = loops
    place = tree.body.index(loop)
    before, behind = tree.body[:place], tree.body[place + 1 :]
    if not _movable(before, loop, behind):
        return None
    [messages] = loop.iter.args  # pyright: ignore
    close = nodes.Call(nodes.EnvironmentAttribute("close"), [_name(messages.name)], [], None, None)
    asks = nodes.Name(_ASKS, "store")
    loop.body.append(nodes.For(asks, close, behind, [], None, False, lineno=loop.lineno))
    tree.body = [*before, loop]
    tree.set_environment(environment)
    code: Any = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def _name(name: str) -> nodes.Name:
    return nodes.Name(name, "load")


def _movable(before: list[nodes.Node], loop: nodes.For, behind: list[nodes.Node]) -> bool:
    """Whether what is behind a loop does the same at the end of each pass through the loop."""
    iterated = loop.iter.args[0] if isinstance(loop.iter, nodes.Call) else None  # by `walked`
    if not isinstance(iterated, nodes.Name) or loop.else_ or loop.test or loop.recursive:
        return False
    parts = [*before, loop, *behind]
    loaded, stored = _names(parts)
    macros = _all(parts, nodes.Macro)
    if loaded & _STATEFUL or _all(parts, *_FOREIGN):
        return False
    of_loop = {id(found.node) for found in _all(parts, nodes.Getattr)}
    names = _all(parts, nodes.Name)
    if any(found.name == "loop" and id(found) not in of_loop for found in names):
        return False  # it could be kept, and asked behind the loop
    if _all([*macros, *behind], nodes.NSRef) or _ASKS in stored:
        return False
    first_loaded, first_stored = _names([*before, loop])
    loop_stored = _names([loop])[1] | {"loop"}
    last_loaded, last_stored = _names(behind)
    if _ASKS in first_loaded or iterated.name in loop_stored:
        return False
    if (last_loaded | last_stored) & loop_stored or last_stored & first_loaded:
        return False
    read = {id(found.node) for found in _all(parts, nodes.Filter) if found.name not in _LAZY}
    kept = _all(_all([*before, loop], nodes.Assign, nodes.AssignBlock), nodes.Filter)
    return not last_loaded & first_stored or all(
        found.name not in _LAZY or id(found) in read for found in kept
    )


def _all(parts: Sequence[nodes.Node], *kinds: type[nodes.Node]) -> list[Any]:
    """Return the nodes of some types in parts of a template, the parts themselves included."""
    inside = [found for part in parts for found in part.find_all(kinds)]
    return [*(part for part in parts if isinstance(part, kinds)), *inside]


def _names(parts: Sequence[nodes.Node]) -> tuple[set[str], set[str]]:
    """Return the names that parts of a template look up, and those that they define."""
    names = _all(parts, nodes.Name)
    loaded = {found.name for found in names if found.ctx == "load"}
    loaded |= {found.name for found in _all(parts, nodes.NSRef)}
    stored = {found.name for found in names if found.ctx != "load"}
    return loaded, stored | {macro.name for macro in _all(parts, nodes.Macro)}
